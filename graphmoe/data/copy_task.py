"""Sequences to be remembered and said again: data made on the spot, without end."""

import zlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graphmoe.errors import DataError

IGNORE = -100
"""Label of a token that is not scored."""


class CopyTask:
    """Random tokens, a delimiter, and then as many blanks, at which the tokens are to be said again.

    Tokens are 1 to ``num_tokens``, :attr:`delimiter` and :attr:`blank` follow, 0 is padding. Only the blanks
    are scored. What a batch holds is a pure function of ``(seed, index, slot)``; seeds of different
    ``part`` never meet.

    Args:
        num_tokens: Different tokens.
        min_length, max_length: Tokens of a sequence, uniform between both.
        seed: Seed of the sequences, at least 0.
        part: ``train``, ``test`` or ``validation``.

    Raises:
        DataError: Fewer than two tokens, lengths out of order, a seed below 0, an unknown part.
    """

    def __init__(
        self,
        num_tokens: int = 126,
        min_length: int = 10,
        max_length: int = 60,
        *,
        seed: int = 0,
        part: str = "train",
    ):
        if num_tokens < 2:
            raise DataError("nothing to remember", "num_tokens", "at least 2", num_tokens)
        if not 1 <= min_length <= max_length:
            expected = f"from 1 to max_length = {max_length}"
            raise DataError("lengths out of order", "min_length", expected, min_length)
        if seed < 0:
            raise DataError("no seed of random sequences", "seed", "at least 0", seed)
        parts = ("train", "test", "validation")
        if part not in parts:
            raise DataError("unknown part", "part", f"one of {', '.join(parts)}", part)
        self.num_tokens, self.min_length, self.max_length = num_tokens, min_length, max_length
        self.seed, self.part = seed, parts.index(part)

    @property
    def delimiter(self) -> int:
        return self.num_tokens + 1

    @property
    def blank(self) -> int:
        return self.num_tokens + 2

    @property
    def vocab_size(self) -> int:
        return self.num_tokens + 3

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the sequences: that of their first batch."""
        first = self.batch(0, 8, slice(0, 8))["input_ids"].numpy()
        return f"{zlib.crc32(first.tobytes()):08x}"

    def describe(self) -> str:
        """One plain line."""
        return f"copy {self.min_length} to {self.max_length} of {self.num_tokens} tokens"

    def batch(self, index: int, size: int, slots: slice) -> dict[str, Tensor]:
        """The rows ``slots`` of batch ``index`` of ``size`` rows.

        Returns:
            ``input_ids [rows, T]``, ``attention_mask [rows, T]`` (0 for padding) and ``labels [rows, T]``,
            -100 but for the blanks, as long as the longest of these rows is.
        """
        rows = []
        for slot in range(*slots.indices(size)):
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.part, index, slot]))
            length = int(rng.integers(self.min_length, self.max_length + 1))
            rows.append(rng.integers(1, self.num_tokens + 1, size=length))
        width = 2 * max((len(row) for row in rows), default=0) + 1
        ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        for i, row in enumerate(rows):
            n = len(row)
            ids[i, :n], ids[i, n], ids[i, n + 1 : 2 * n + 1] = row, self.delimiter, self.blank
            labels[i, n + 1 : 2 * n + 1] = row
        ids = torch.from_numpy(ids)
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.from_numpy(labels),
        }
