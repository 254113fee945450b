"""A corpus as token ids, and what a model of token frequencies alone would score on it."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from graphmoe.data.sharded_tokens import ShardedTokens, release

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 1 << 20  # tokens held in memory at a time while walking over a memory-mapped array


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out tokens of one data set.

    Attributes:
        name: What the tokens were read from, such as ``"stdlib (Python 3.11.7)"``.
        train: Training tokens, ``[tokens]``, in the smallest unsigned dtype that holds ``vocab_size``; a
            memory map in the dtype of the file where they come from one ``.npy`` shard, and a view of
            several maps, which reads like an array, where they come from more.
        held_out: Held-out tokens, ``[tokens]``, likewise.
        held_out_bytes: UTF-8 bytes of the held-out documents, or ``None`` where only tokens are known.
        vocab_size: Number of token ids; every id is smaller.
        tokenizer: A transformers tokenizer, or ``None`` for token shards that come without one.
        num_documents: Number of (training, held-out) documents; shards, where only tokens are known.
        fingerprint: SHA-256 of the token ids and the tokenizer, in hexadecimal digits.
        train_bytes: UTF-8 bytes of the training documents, or ``None`` where only tokens are known.
    """

    name: str
    train: np.ndarray | ShardedTokens = field(repr=False)
    held_out: np.ndarray | ShardedTokens = field(repr=False)
    held_out_bytes: int | None
    vocab_size: int
    tokenizer: "PreTrainedTokenizerFast | None" = field(repr=False)
    num_documents: tuple[int, int]
    fingerprint: str
    train_bytes: int | None = None

    def bits_per_byte(self, loss: float) -> float | None:
        """Turn a held-out loss in nats per token into bits per byte of held-out text.

        Returns ``None`` where the bytes are not known. The end-of-text token behind each document
        counts as a token to be predicted, but not as a byte.
        """
        if self.held_out_bytes is None:
            return None
        return loss / math.log(2) * self.held_out.size / self.held_out_bytes

    def split_held_out(self) -> tuple["Corpus", "Corpus"]:
        """Two corpora of the same training tokens, each with one half of the held-out ones.

        The first is for choosing (a learning rate, a model), the second for reporting what the choice
        is worth. Where the tokenizer knows an end of text, the cut lies behind the last one before the
        middle; a single document is cut in the middle. Both fingerprints are new.
        """
        middle = self.held_out.size // 2
        if self.tokenizer is not None:
            middle = self._last_end(middle) or middle
        parts = (_part(self.held_out, 0, middle), _part(self.held_out, middle, self.held_out.size))
        sizes = (None, None)
        if self.held_out_bytes is not None and self.tokenizer is not None:
            lengths = [sum(map(self._decoded_bytes, chunks(part))) for part in parts]
            # In proportion: a character cut in two, or a tokenizer that loses spaces, changes lengths.
            first = round(self.held_out_bytes * lengths[0] / max(sum(lengths), 1))
            sizes = (first, self.held_out_bytes - first)
        first, second = (
            replace(
                self,
                held_out=part,
                held_out_bytes=size,
                fingerprint=fingerprint(self.train, part, self.tokenizer),
            )
            for part, size in zip(parts, sizes, strict=True)
        )
        return first, second

    def _last_end(self, stop: int) -> int:
        """Tokens up to the end of the last whole document before ``stop``; 0 if there is none."""
        seen, last = 0, 0
        for chunk in chunks(_part(self.held_out, 0, stop)):
            ends = np.flatnonzero(chunk == self.tokenizer.eos_token_id)
            last = seen + int(ends[-1]) + 1 if ends.size else last
            seen += chunk.size
        return last

    def _decoded_bytes(self, tokens: np.ndarray) -> int:
        return len(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode())

    def describe(self) -> str:
        """One plain line: megabytes (1e6 bytes), tokens, documents or shards, and vocabulary size."""
        unit = "shards" if self.held_out_bytes is None else "documents"

        def size(tokens: np.ndarray | ShardedTokens, num_bytes: int | None, count: int) -> str:
            megabytes = "" if num_bytes is None else f"{num_bytes / 1e6:.2f} MB, "
            return f"{megabytes}{tokens.size:,} tokens, {count:,} {unit}"

        train = size(self.train, self.train_bytes, self.num_documents[0])
        held_out = size(self.held_out, self.held_out_bytes, self.num_documents[1])
        return f"{self.name}: train {train}; held out {held_out}; vocabulary {self.vocab_size:,}"


def fingerprint(
    train: np.ndarray | ShardedTokens,
    held_out: np.ndarray | ShardedTokens,
    tokenizer: "PreTrainedTokenizerFast | None",
) -> str:
    """SHA-256 over both parts' token ids and the tokenizer, whatever dtype the ids are stored in."""
    return fingerprint_of(((tokens.size, chunks(tokens)) for tokens in (train, held_out)), tokenizer)


def fingerprint_of(
    parts: Iterable[tuple[int, Iterable[np.ndarray]]], tokenizer: "PreTrainedTokenizerFast | None"
) -> str:
    """The :func:`fingerprint` of parts given as (tokens, pieces of them in order), walked over once."""
    digest = hashlib.sha256()
    for size, pieces in parts:
        digest.update(size.to_bytes(8, "little"))
        for piece in pieces:
            digest.update(piece.astype("<u4"))
    if tokenizer is not None:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def chunks(tokens: np.ndarray | ShardedTokens) -> Iterator[np.ndarray]:
    """Walk over an array in pieces that fit in memory, of at most ``CHUNK`` tokens."""
    for start in range(0, tokens.size, CHUNK):
        yield tokens[start : start + CHUNK]
        release(tokens)


def _part(tokens: np.ndarray | ShardedTokens, start: int, stop: int) -> np.ndarray | ShardedTokens:
    """Tokens ``start`` to ``stop``, not copied."""
    return tokens.part(start, stop) if isinstance(tokens, ShardedTokens) else tokens[start:stop]


def unigram_loss(corpus: Corpus) -> float:
    """Held-out cross-entropy, in nats per token, of a model that knows token frequencies only.

    The frequencies are counted on the training tokens and smoothed by adding one to each count.
    """
    train, held_out = (_count(tokens, corpus.vocab_size) for tokens in (corpus.train, corpus.held_out))
    log_probability = np.log(train + 1.0) - math.log(train.sum() + corpus.vocab_size)
    return float(-(held_out * log_probability).sum() / held_out.sum())


def _count(tokens: np.ndarray | ShardedTokens, vocab_size: int) -> np.ndarray:
    """Occurrences of each id, ``[vocab_size]`` int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in chunks(tokens):
        counts += np.bincount(chunk.astype(np.int64), minlength=vocab_size)
    return counts
