"""A folder of token shards from the writer's side: manifest, tokenizer, leftovers, one writer at a time."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graphmoe.data.manifest import MANIFEST, TOKENIZER, Manifest, sha256_of
from graphmoe.data.part_writer import DRAFT, sync, write_errors
from graphmoe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder; a crash leaves the old or the new one."""
    path, draft = folder / MANIFEST, folder / f".{MANIFEST}{DRAFT}"
    with write_errors(path):
        with draft.open("wb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(folder)


def save_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Write a tokenizer's files, each of them whole or not at all; returns the SHA-256 of each."""
    draft = folder / f".tokenizer{DRAFT}"
    with write_errors(folder / TOKENIZER):
        shutil.rmtree(draft, ignore_errors=True)
        tokenizer.save_pretrained(draft)
        digests = {}
        for path in sorted(path for path in draft.iterdir() if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            digests[path.name] = sha256_of(path)
            os.replace(path, folder / path.name)
        shutil.rmtree(draft)
        sync(folder)
    return digests


def remove_shards(folder: Path, manifest: Manifest) -> None:
    """Remove what the writer of a manifest wrote. The manifest goes last: a removal can be repeated."""
    ours = re.compile(r"(train|valid)_\d{6}\.npy", re.ASCII)
    with write_errors(folder):
        for path in list(folder.iterdir()):
            if ours.fullmatch(path.name) or path.name in manifest.tokenizer:
                path.unlink()
        (folder / MANIFEST).unlink()


def remove_drafts(folder: Path) -> None:
    """Remove what killed writers left."""
    with write_errors(folder):
        for path in list(folder.iterdir()):
            if path.name.endswith(DRAFT):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the right to write into a folder; it ends with the process, however that ends.

    Raises:
        DataError: If another process holds it.
    """
    with write_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError("another process is writing into this folder", folder) from error
        except OSError as error:
            raise DataError("cannot be locked", folder, got=error.strerror) from error
        yield
    finally:
        os.close(handle)
