"""Token shards: one-dimensional ``.npy`` files of token ids, mapped into memory and checked first."""

import math
import os
from pathlib import Path

import numpy as np

from graphmoe.data.corpus import Corpus, chunks, fingerprint
from graphmoe.data.tokenizer import first_line, num_tokens, pretrained_tokenizer
from graphmoe.errors import DataError

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def find_shards(path: Path) -> list[Path]:
    """The ``.npy`` files of a folder in the order of their names, or the one that ``path`` itself is."""
    if path.is_dir():
        return sorted(path.glob("*.npy"))
    return [path] if path.suffix == ".npy" else []


def load_shards(paths: list[Path], *, name: str, vocab_size: int, held_out: float) -> Corpus:
    """Load token shards; see :func:`graphmoe.data.load_text`.

    Raises:
        DataError: If a shard is damaged or empty, or holds ids outside the vocabulary.
    """
    tokenizer = None
    if (paths[0].parent / "tokenizer.json").exists():
        tokenizer = pretrained_tokenizer(str(paths[0].parent))
        vocab_size = num_tokens(tokenizer)
    if not 1 <= vocab_size <= 2**32:
        raise DataError("no such vocabulary", "vocab_size", "1 to 2^32", vocab_size)
    shards = [map_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        _check_ids(path, shard, vocab_size)
    if len(shards) == 1:
        train, rest = _split(shards[0], held_out, paths[0])
    else:
        train, rest = _join(shards[:-1], vocab_size), shards[-1]
    return Corpus(
        name=name,
        train=train,
        held_out=rest,
        held_out_bytes=None,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        num_documents=(max(1, len(shards) - 1), 1),
        fingerprint=fingerprint(train, rest, tokenizer),
    )


def map_shard(path: Path) -> np.ndarray:
    """Map one shard into memory, ``[tokens]``, once its header agrees with the size of the file.

    Raises:
        DataError: If the file is no ``.npy`` file, is cut short, or holds anything but integers in one
            dimension.
    """
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
        raise DataError("empty shard", path, "at least one token", shape[0])
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, TypeError, ValueError) as error:
        raise DataError("cannot be mapped into memory", path, got=first_line(error)) from error


def _check_ids(path: Path, shard: np.ndarray, vocab_size: int) -> None:
    lowest = min(int(chunk.min()) for chunk in chunks(shard))
    highest = max(int(chunk.max()) for chunk in chunks(shard))
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


def _join(shards: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """Several shards copied into one array in memory; one stays mapped."""
    if len(shards) == 1:
        return shards[0]
    return np.concatenate([shard.astype(np.min_scalar_type(vocab_size - 1)) for shard in shards])
