"""Token shards: one-dimensional ``.npy`` files of token ids, mapped into memory and checked first."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphmoe.data.corpus import Corpus, chunks, fingerprint_of
from graphmoe.data.manifest import MANIFEST, TOKENIZER, Manifest, Shard, read_manifest, sha256_of
from graphmoe.data.progress import Progress
from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.data.tokenizer import first_line, num_tokens, pretrained_tokenizer
from graphmoe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SUFFIX = ".npy"


def find_shards(path: Path) -> list[Path]:
    """The ``.npy`` files of a folder in the order of their names, or the one that ``path`` itself is."""
    if path.is_dir():
        return sorted(path.glob(f"*{SUFFIX}"))
    return [path] if path.suffix == SUFFIX else []


def has_shards(path: Path) -> bool:
    """Whether a file or folder is read as token shards, not as text."""
    return bool(find_shards(path)) or (path.is_dir() and os.path.lexists(path / MANIFEST))


def load_shards(path: Path, *, tokenizer: str, vocab_size: int, held_out: float) -> Corpus:
    """Load token shards; see :func:`graphmoe.data.load_text`.

    Every id is looked at once, which takes a second for some 10^8 tokens.

    Raises:
        DataError: If a shard is damaged or empty, or holds ids outside the vocabulary; if the folder
            is not what its manifest says.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    if tokenizer not in ("bpe", manifest and manifest.settings.get("tokenizer")):
        raise DataError("token shards cannot be tokenized again", "tokenizer", "bpe, the default", tokenizer)
    folder = path if path.is_dir() else path.parent
    tool = None
    if (folder / TOKENIZER).exists():
        tool = pretrained_tokenizer(str(folder))
        vocab_size = num_tokens(tool)
    if not 1 <= vocab_size <= 2**32:
        raise DataError("no such vocabulary", "vocab_size", "1 to 2^32", vocab_size)
    if manifest is not None:
        return _listed(path, manifest, tool, vocab_size)
    paths = find_shards(path)
    shards = [map_shard(each) for each in paths]
    if len(shards) == 1:
        train, rest = _split(shards[0], held_out, paths[0])
        parts = [(paths[0], train, None)], [(paths[0], rest, None)]
    else:
        checks = [(each, shard, None) for each, shard in zip(paths, shards, strict=True)]
        parts = checks[:-1], checks[-1:]
    mark = _fingerprint(parts, vocab_size, tool, path)
    train, rest = (_join([shard for _, shard, _ in part], vocab_size) for part in parts)
    return Corpus(
        name=str(path),
        train=train,
        held_out=rest,
        held_out_bytes=None,
        vocab_size=vocab_size,
        tokenizer=tool,
        num_documents=(len(parts[0]), 1),
        fingerprint=mark,
    )


def _listed(
    path: Path, manifest: Manifest, tool: "PreTrainedTokenizerFast | None", vocab_size: int
) -> Corpus:
    """The corpus in a folder with a manifest, which has to agree with it."""
    if not manifest.complete:
        raise DataError(
            "unfinished token shards",
            path,
            "python -m graphmoe.data.shards run to its end, with --resume or --overwrite "
            f"(without {MANIFEST}, the shards that are there can be read)",
        )
    listed = [shard for part in (manifest.train, manifest.held_out) for shard in part.shards]
    extra = {each.name for each in find_shards(path)} - {shard.file for shard in listed}
    if extra:
        raise DataError("a shard that is not listed", path / min(extra), f"the shards of {MANIFEST}")
    check_tokenizer(path, manifest)
    parts = tuple(
        [(path / shard.file, check_shard(path, shard), shard) for shard in part.shards]
        for part in (manifest.train, manifest.held_out)
    )
    mark = _fingerprint(parts, vocab_size, tool, path)
    train, rest = (_join([shard for _, shard, _ in part], vocab_size) for part in parts)
    return Corpus(
        name=str(path),
        train=train,
        held_out=rest,
        held_out_bytes=manifest.held_out.total("bytes"),
        vocab_size=vocab_size,
        tokenizer=tool,
        num_documents=(manifest.train.total("documents"), manifest.held_out.total("documents")),
        fingerprint=mark,
        train_bytes=manifest.train.total("bytes"),
    )


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Compare the files of the tokenizer with those that a manifest lists.

    Raises:
        DataError: If one is missing or another.
    """
    for name, digest in manifest.tokenizer.items():
        if not (folder / name).is_file():
            raise DataError("no such file", folder / name, "the tokenizer of these shards")
        if sha256_of(folder / name) != digest:
            raise DataError(
                "not the tokenizer of these shards", folder / name, f"a file with the SHA-256 of {MANIFEST}"
            )


def check_shard(folder: Path, shard: Shard) -> np.ndarray:
    """Map a shard that a manifest lists; only its size is compared.

    Raises:
        DataError: As :func:`map_shard`, or if it does not hold the tokens that are listed.
    """
    array = map_shard(folder / shard.file)
    if array.size != shard.tokens:
        raise DataError("damaged shard", folder / shard.file, f"{shard.tokens} tokens", array.size)
    return array


def map_shard(path: Path) -> np.memmap:
    """Map one shard into memory, ``[tokens]``, once its header agrees with the size of the file.

    Raises:
        DataError: If the file is no ``.npy`` file, is cut short, or holds anything but integers in one
            dimension.
    """
    if not path.is_file():  # also keeps a pipe from blocking
        what = "not a file" if os.path.lexists(path) else "no such file"
        raise DataError(what, path, "a file written by numpy.save")
    try:
        with path.open("rb") as file:
            shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError("cannot be read", path, got=error.strerror) from error
    except Exception as error:  # a header is a Python literal, and parsing one fails in many ways
        raise DataError("not a .npy file", path, "a file written by numpy.save", first_line(error)) from error
    if dtype.kind not in "iu" or len(shape) != 1:
        got = f"{dtype} array of shape {shape}"
        raise DataError("not an array of token ids", path, "one dimension of integers", got)
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise DataError("damaged shard", path, f"{expected} bytes, as its header says", size)
    if shape[0] < 1:
        raise DataError("empty shard", path, "at least one token", int(shape[0]))
    try:
        return np.memmap(path, dtype, "r", start, (int(shape[0]),))
    except (OSError, TypeError, ValueError) as error:
        raise DataError(
            "cannot be mapped into memory",
            path,
            "fewer, larger shards, where too many are open",
            first_line(error),
        ) from error


Checks = Sequence[tuple[Path, np.ndarray, Shard | None]]


def _fingerprint(
    parts: tuple[Checks, Checks], vocab_size: int, tool: "PreTrainedTokenizerFast | None", path: Path
) -> str:
    """Fingerprint of both parts; on the way, every id and every digest of the manifest is checked."""
    total = sum(shard.size for part in parts for _, shard, _ in part)
    with Progress(f"checking {path}", total, "token", patience=2.0) as progress:

        def walk(part: Checks) -> Iterator[np.ndarray]:
            for file, shard, listed in part:
                digest = hashlib.sha256()
                for chunk in chunks(shard):
                    _check_ids(file, chunk, vocab_size)
                    if listed is not None:
                        digest.update(chunk)
                    progress.advance(chunk.size)
                    yield chunk
                if listed is not None and digest.hexdigest() != listed.sha256:
                    raise DataError(
                        "damaged shard", file, f"tokens with the SHA-256 of {MANIFEST}", digest.hexdigest()
                    )

        sized = ((sum(shard.size for _, shard, _ in part), walk(part)) for part in parts)
        return fingerprint_of(sized, tool)


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise DataError("a token id is negative", path, f"ids from 0 to {vocab_size - 1}", lowest)
    if highest >= vocab_size:
        expected = f"ids from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
        raise DataError("a token id is outside the vocabulary", path, expected, highest)


def _split(shard: np.ndarray, held_out: float, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of one shard, still mapped."""
    cut = shard.size - max(1, round(shard.size * held_out))
    if cut < 1:
        raise DataError("too small to hold anything out", path, "at least 2 tokens", shard.size)
    return shard[:cut], shard[cut:]


def _join(shards: list[np.ndarray], vocab_size: int) -> np.ndarray | ShardedTokens:
    """One array of one shard or of several, still mapped."""
    if len(shards) == 1:
        return shards[0]
    return ShardedTokens(shards, np.min_scalar_type(vocab_size - 1))
