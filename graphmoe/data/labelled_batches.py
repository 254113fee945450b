"""Labelled texts as batches of token ids, in an order that any resumed or distributed run agrees on."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from graphmoe.data.pieces import cut_document
from graphmoe.data.tokenizer import encode_pieces, piece_size
from graphmoe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POOL = 8
"""Batches whose texts are sorted by length together, so that a batch has little padding."""


class LabelledBatch(NamedTuple):
    """Texts of one batch.

    Attributes:
        ids: Token ids ``[n, T]`` int64, filled up behind the end of a text.
        mask: 1 for a token, 0 for filling, ``[n, T]`` int64.
        labels: Class of each text, ``[n]`` int64.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def encode_texts(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], name: str, length: int
) -> list[np.ndarray]:
    """Token ids of each text, at most the first ``length``, without an end of text.

    Args:
        tokenizer: The tokenizer.
        texts: What to encode.
        name: What :func:`~graphmoe.data.tokenizer.build_tokenizer` was asked for.
        length: Most tokens of a text.

    Raises:
        DataError: If the tokenizer fails on a text, or makes nothing of it.
    """
    size = piece_size(name)
    pieces = (piece for text in texts for piece in cut_document([text], size, held_out=False))
    found: list[list[np.ndarray]] = [[]]
    for batch, ids, counts in encode_pieces(tokenizer, pieces, name):
        for piece, part in zip(batch, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
            found[-1].append(part)
            if piece.last:
                found.append([])
    rows = [np.concatenate(parts)[:-1][:length] for parts in found[:-1]]  # the last id ends the text
    for text, row in zip(texts, rows, strict=True):
        if not row.size:
            raise DataError("the tokenizer makes nothing of a text", name, "tokens", text[:40])
    return rows


class LabelledBatches:
    """Batches of texts of similar length, in an order that depends on the seed only.

    What a batch holds is a pure function of ``(seed, step, batch_size)`` and its part of ``slots``: a resumed
    run reads on where it stopped. Every epoch has its own permutation, within which texts of :data:`POOL`
    batches are sorted by length; batches then come in a random order. Texts that do not fill the last batch
    of an epoch are left out of it, other ones each time.

    Args:
        rows: Token ids of each text.
        labels: Class of each, ``[n]``.
        pad: Token id that fills up the rows of a batch.
        seed: Seed of the order, at least 0.

    Raises:
        DataError: No text, not one label a text, or a negative seed.
    """

    def __init__(self, rows: Sequence[np.ndarray], labels: np.ndarray, *, pad: int, seed: int = 0):
        if not len(rows) or len(rows) != len(labels):
            raise DataError("not one label a text", "labels", max(1, len(rows)), len(labels))
        if seed < 0:
            raise DataError("no seed of a random order", "seed", "at least 0", seed)
        self.rows, self.labels, self.pad, self.seed = list(rows), np.asarray(labels), pad, seed
        self.lengths = np.array([row.size for row in self.rows])
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, batch_size: int, slots: slice | range | None = None) -> LabelledBatch:
        """The texts of one batch, or one rank's part of them.

        Args:
            step: Number of the batch, from 0.
            batch_size: Texts in the whole batch, over all ranks.
            slots: Which of them to return; all by default.

        Raises:
            DataError: If ``step`` or ``batch_size`` is out of range.
        """
        if step < 0 or batch_size < 1:
            raise DataError("no such batch", "step, batch_size", ">= 0 and >= 1", (step, batch_size))
        epoch, index = divmod(step, max(1, len(self) // batch_size))
        chosen = self._order(epoch, batch_size)[index]
        return self._gather(chosen if slots is None else chosen[_as_slice(slots)])

    def sequential(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Every text once, for evaluation, the shortest first.

        Raises:
            DataError: If ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise DataError("nothing to evaluate on", "batch_size", "at least 1", batch_size)
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self._gather(order[start : start + batch_size])

    def _order(self, epoch: int, batch_size: int) -> np.ndarray:
        """Texts of each batch of an epoch, ``[batches, batch_size]``; those of two epochs are kept."""
        key = (epoch, batch_size)
        if key not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self))
            if len(order) < batch_size:  # so few texts that a batch has some of them twice
                order = np.resize(order, batch_size)
            order = order[: len(order) // batch_size * batch_size]
            size = POOL * batch_size
            pools = [order[start : start + size] for start in range(0, len(order), size)]
            pools = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
            batches = np.concatenate(pools).reshape(-1, batch_size)
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            # Within a batch, ranks would else get texts of different lengths each.
            self._orders[key] = rng.permuted(batches[rng.permutation(len(batches))], axis=1)
        return self._orders[key]

    def _gather(self, chosen: np.ndarray) -> LabelledBatch:
        lengths = self.lengths[chosen]
        mask = (np.arange(lengths.max(initial=1)) < lengths[:, None]).astype(np.int64)
        ids = np.full(mask.shape, self.pad, dtype=np.int64)
        ids[mask > 0] = np.concatenate([self.rows[index] for index in chosen.tolist()] or [np.empty(0)])
        return LabelledBatch(ids, mask, self.labels[chosen])

    def __repr__(self) -> str:
        longest = int(self.lengths.max())
        return f"{type(self).__name__}({len(self):,} texts of up to {longest} tokens, seed={self.seed})"


def _as_slice(slots: slice | range) -> slice | list[int]:
    return slots if isinstance(slots, slice) else list(slots)
