"""From a corpus of any size to a folder of token shards."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graphmoe.data.documents import local_path
from graphmoe.data.manifest import MANIFEST, Manifest, read_manifest
from graphmoe.data.part_writer import DRAFT, PartWriter, write_errors
from graphmoe.data.pieces import Piece, cut_document
from graphmoe.data.progress import Progress
from graphmoe.data.shard_files import check_shard, check_tokenizer
from graphmoe.data.shard_folder import (
    only_writer,
    remove_drafts,
    remove_shards,
    save_manifest,
    save_tokenizer,
)
from graphmoe.data.sources import Source, open_source
from graphmoe.data.tokenizer import (
    build_tokenizer,
    encode_pieces,
    piece_size,
    pretrained_tokenizer,
    token_dtype,
    train_bpe_on,
)
from graphmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_TOKENS = 1 << 25  # 67 MB of two-byte ids: a stopped run repeats at most that


def write_shards(
    dataset: str,
    out_dir: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    shard_tokens: int = SHARD_TOKENS,
    split: str = "train",
    text_column: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    streaming: bool = True,
    resume: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Tokenize a corpus into ``.npy`` shards, of which :func:`graphmoe.data.load_text` makes a corpus.

    Every document is followed by the end-of-text token. Tokens, their order and what is held out
    are those of ``load_text`` of the same corpus with the same arguments; rows of a data set of the
    hub that has no split for evaluation and more than 20 million characters are held out one by one, where
    the seeded hash of their text says so, and ``"bpe"`` is trained on the first 20 million characters.

    A shard has its name only once it is complete and on the disk. A run that was stopped, however that
    happened, is not read, and goes on behind its last finished shard with ``resume``; the result is
    the same, byte for byte.

    Args:
        dataset: ``"stdlib"``, a text file, a folder of text, or a Hugging Face data set.
        out_dir: The folder to write; made where it is missing.
        tokenizer: ``"bpe"``, ``"bytes"``, or the folder or hub name of a pretrained tokenizer.
        vocab_size: Largest vocabulary of ``"bpe"``.
        shard_tokens: Tokens a shard; the last of each part has what is left.
        split: The split of a Hugging Face data set to train on.
        text_column: Its column of text; by default ``text``, or the only column of strings.
        held_out: Share to hold out, where no split is published for it.
        seed: Seed of the choice of held-out documents.
        streaming: Whether a Hugging Face data set is read as it arrives, not downloaded first.
        resume: Go on with what an earlier call with the same arguments left.
        overwrite: Remove the shards that are there first.

    Returns:
        What was written.

    Raises:
        ConfigError: If an argument is out of range, or does not fit what is in the folder.
        DataError: If the corpus or the tokenizer cannot be used, or the file system refuses.
    """
    for name, holds, expected, value in (
        ("held_out", 0 < held_out < 1, "a number between 0 and 1", held_out),
        ("shard_tokens", shard_tokens >= 1, "at least 1", shard_tokens),
        ("vocab_size", tokenizer != "bpe" or vocab_size >= 257, "at least 257", vocab_size),
        ("seed", seed >= 0, "at least 0", seed),
        ("resume", not (resume and overwrite), "one of --resume and --overwrite", "both"),
    ):
        if not holds:
            raise ConfigError("value cannot be used", f"--{name}", expected, value)
    settings = {
        "dataset": str(dataset),
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "shard_tokens": shard_tokens,
        "split": split,
        "text_column": text_column,
        "held_out": held_out,
        "seed": seed,
    }
    folder, corpus = Path(out_dir), local_path(str(dataset), None)
    if corpus is not None and folder.resolve().is_relative_to(corpus.resolve()):
        raise ConfigError("lies in the corpus", "--out_dir", "a folder outside it", str(folder))
    manifest = _state(folder, settings, resume=resume, overwrite=overwrite)
    if resume and manifest.complete:
        return manifest
    source = open_source(
        str(dataset),
        held_out=held_out,
        seed=seed,
        split=split,
        text_column=text_column,
        streaming=streaming,
    )
    tool = None if resume and manifest.tokenizer else _tokenizer(tokenizer, source, vocab_size)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        # Again: another process may have been faster.
        manifest = _state(folder, settings, resume=resume, overwrite=overwrite)
        remove_drafts(folder)
        try:
            if manifest is not None and not resume:
                remove_shards(folder, manifest)
                manifest = None
            if manifest is None or not manifest.tokenizer:
                tool = tool or _tokenizer(tokenizer, source, vocab_size)
                manifest = _begin(folder, Manifest(source.name, settings), tool)
            else:
                tool = _take_up(folder, manifest)
            return _write(folder, manifest, source, tool)
        finally:
            with suppress(DataError):
                remove_drafts(folder)


def _begin(folder: Path, manifest: Manifest, tool: "PreTrainedTokenizerFast") -> Manifest:
    """Make a folder known as one of shards, then put the tokenizer into it."""
    save_manifest(folder, manifest)
    manifest = replace(manifest, tokenizer=save_tokenizer(folder, tool))
    save_manifest(folder, manifest)
    return manifest


def _take_up(folder: Path, manifest: Manifest) -> "PreTrainedTokenizerFast":
    """Check what is finished; returns the tokenizer that it was made with."""
    check_tokenizer(folder, manifest)
    for shard in (*manifest.train.shards, *manifest.held_out.shards):
        check_shard(folder, shard)
    return pretrained_tokenizer(str(folder))


def _tokenizer(name: str, source: Source, vocab_size: int) -> "PreTrainedTokenizerFast":
    if name == "bpe":
        return train_bpe_on(source.sample(), vocab_size)
    return build_tokenizer(name, [], vocab_size)


def _state(folder: Path, settings: dict, *, resume: bool, overwrite: bool) -> Manifest | None:
    """What is in the folder, which has to be what the flags say."""
    content = []
    if os.path.isdir(folder):  # Path's own methods raise on a long name
        with write_errors(folder):
            content = [path for path in folder.iterdir() if not path.name.endswith(DRAFT)]
    elif os.path.lexists(folder):
        raise ConfigError("not a folder", "--out_dir", "a folder, or a name for one", str(folder))
    manifest = read_manifest(folder) if content else None
    if resume:
        if manifest is None:
            raise ConfigError("there is nothing to resume", folder, f"a folder with {MANIFEST}")
        for name, value in settings.items():
            before = manifest.settings.get(name)
            # The same text may lie elsewhere now; that it is the same is checked on reading it.
            if name != "dataset" and before != value:
                raise ConfigError(
                    "not what the finished shards were made with", f"--{name}", str(before), value
                )
    elif manifest is not None and not overwrite:
        what = "token shards exist" if manifest.complete else "unfinished token shards exist"
        expected = "--overwrite" if manifest.complete else "--resume, --overwrite"
        raise ConfigError(what, folder, f"{expected} or another --out_dir")
    elif manifest is None and content:
        raise ConfigError(
            "this folder holds something else and is not overwritten", folder, "an empty or a new folder"
        )
    return manifest


def _write(folder: Path, manifest: Manifest, source: Source, tool: "PreTrainedTokenizerFast") -> Manifest:
    """Write what is missing."""
    settings = manifest.settings
    size = piece_size(settings["tokenizer"])

    def commit() -> None:
        save_manifest(folder, current())

    def current() -> Manifest:
        return replace(manifest, train=parts[0].part, held_out=parts[1].part)

    parts = [
        PartWriter(
            folder,
            prefix,
            part,
            dtype=token_dtype(tool),
            shard_tokens=settings["shard_tokens"],
            commit=commit,
        )
        for prefix, part in (("train", manifest.train), ("valid", manifest.held_out))
    ]
    with Progress(f"writing {folder}", source.total, source.unit, patience=1.0) as progress:

        def size_of(piece: Piece, num_bytes: int) -> int:
            return num_bytes if source.unit == "byte" else int(piece.last)

        def missing() -> Iterator[Piece]:
            for document in source.documents():
                for piece in cut_document(document.chunks, size, held_out=document.held_out):
                    if parts[piece.held_out].skip(piece):
                        progress.advance(size_of(piece, len(piece.text.encode())), skipped=True)
                    else:
                        yield piece

        tokens, num_bytes, began = 0, 0, time.perf_counter()
        try:
            for batch, ids, counts in encode_pieces(tool, missing(), settings["tokenizer"]):
                done, stop = 0, 0
                for piece, count in zip(batch, counts, strict=True):
                    start, stop = stop, stop + count
                    written = parts[piece.held_out].add(piece, ids[start:stop])
                    num_bytes += written
                    done += size_of(piece, written)
                tokens += ids.size
                speed = num_bytes / 1e6 / (time.perf_counter() - began)
                progress.advance(done, f"{tokens:,} tokens, {speed:.1f} MB/s")
            for part in parts:
                part.finish()
        finally:
            for part in parts:
                part.abort()
    if not parts[1].part.shards:
        raise DataError("no document was held out", source.name, "more documents, or a larger --held_out")
    if not parts[0].part.shards:
        raise DataError("every document was held out", source.name, "more documents, or a smaller --held_out")
    done = replace(current(), complete=True)
    save_manifest(folder, done)
    return done
