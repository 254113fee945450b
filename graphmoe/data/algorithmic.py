"""Sequences of bits to be copied, repeated and recalled: drawn from (seed, index), never stored."""

from typing import NamedTuple

import numpy as np

from graphmoe.errors import ConfigError, DataError

UNSCORED = -100.0
"""Label of what is not asked for."""


class BitBatch(NamedTuple):
    """Sequences of one length.

    Attributes:
        inputs: float32 ``[B, T, input_size]``.
        labels: float32 ``[B, T, output_size]``: 0, 1 or :data:`UNSCORED`.
    """

    inputs: np.ndarray
    labels: np.ndarray


class BitTask:
    """What a task of bits has: sizes, how long its sequences are, and how one is drawn.

    Args:
        bits: Bits of a vector.
        longest: Largest difficulty in training: vectors of a sequence, items of a list.

    Attributes:
        input_size: Channels of an input.
        output_size: Bits of an answer.
        answers: What :meth:`wrong` counts.
        chance: Share of answers that a guess gets right.
        shortest: Least difficulty.

    Raises:
        ConfigError: Too few bits, or nothing between the shortest and the longest.
    """

    name: str
    answers = "bits"
    chance = 0.5
    shortest = 1

    def __init__(self, bits: int, longest: int):
        if bits < 1:
            raise ConfigError("nothing to remember", "--bits", "at least 1", bits)
        if longest < self.shortest:
            raise ConfigError("too short", "--length", f"at least {self.shortest}", longest)
        self.bits, self.longest = bits, longest
        self.input_size, self.output_size = bits + 1, bits

    @property
    def fingerprint(self) -> str:
        """Identifies what is drawn."""
        return repr(self)

    def draw(self, rng: np.random.Generator, size: int, length: int) -> BitBatch:
        """``size`` sequences of one difficulty."""
        raise NotImplementedError

    def slots(self, length: int) -> int:
        """Vectors that have to be held at once at this difficulty."""
        return length

    def batch(
        self, seed: int, index: int, size: int, slots: slice = slice(None), longest: int | None = None
    ) -> BitBatch:
        """The rows ``slots`` of batch ``index``, all of one random difficulty: a pure function.

        Args:
            seed: Of all batches.
            index: Number of the batch, from 0.
            size: Sequences in the batch, over all ranks.
            slots: Which of them to return.
            longest: Largest difficulty at this time; by default that of the task.

        Raises:
            DataError: A seed, an index or a size out of range.
        """
        if seed < 0 or index < 0 or size < 1:
            raise DataError("no such batch", "seed, index, size", ">= 0, >= 0 and >= 1", (seed, index, size))
        rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
        longest = self.longest if longest is None else min(longest, self.longest)
        found = self.draw(rng, size, int(rng.integers(self.shortest, max(longest, self.shortest) + 1)))
        return BitBatch(found.inputs[slots], found.labels[slots])

    def of_length(self, seed: int, part: int, length: int, size: int) -> BitBatch:
        """Sequences of one difficulty that no training batch holds but by chance, for scores.

        Args:
            seed: Of the run.
            part: Number of the set: those of different numbers are independent.
            length: Their difficulty.
            size: How many.
        """
        entropy = np.random.SeedSequence([seed, 1 << 32, part, length])
        return self.draw(np.random.default_rng(entropy), size, length)

    def wrong(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which of the answers asked for are wrong, one after another: here every bit is an answer."""
        scored = labels != UNSCORED
        return ((logits > 0) != (labels > 0.5))[scored]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits}, longest={self.longest})"


class CopyTask(BitTask):
    """Write random vectors, then, after a mark, give them back in order (Graves et al., 2014)."""

    name = "copy"

    def draw(self, rng: np.random.Generator, size: int, length: int) -> BitBatch:
        vectors = rng.integers(0, 2, (size, length, self.bits)).astype(np.float32)
        inputs = np.zeros((size, 2 * length + 1, self.input_size), np.float32)
        labels = np.full((size, 2 * length + 1, self.bits), UNSCORED, np.float32)
        inputs[:, :length, : self.bits] = vectors
        inputs[:, length, self.bits] = 1
        labels[:, length + 1 :] = vectors
        return BitBatch(inputs, labels)


class RepeatCopyTask(BitTask):
    """Give random vectors back several times, as often as the mark says, then say that it is over.

    Args:
        bits: Bits of a vector.
        longest: Most vectors.
        most_repeats: Most repetitions; the mark is their number over this.
    """

    name = "repeat_copy"

    def __init__(self, bits: int, longest: int, most_repeats: int):
        super().__init__(bits, longest)
        if most_repeats < 1:
            raise ConfigError("nothing to repeat", "--repeats", "at least 1", most_repeats)
        self.most_repeats = most_repeats
        self.output_size = bits + 1

    def draw(self, rng: np.random.Generator, size: int, length: int) -> BitBatch:
        return self.repeated(rng, size, length, int(rng.integers(1, self.most_repeats + 1)))

    def repeated(self, rng: np.random.Generator, size: int, length: int, repeats: int) -> BitBatch:
        """``size`` sequences with one number of repetitions."""
        vectors = rng.integers(0, 2, (size, length, self.bits)).astype(np.float32)
        steps = length + 1 + length * repeats + 1
        inputs = np.zeros((size, steps, self.input_size), np.float32)
        labels = np.full((size, steps, self.output_size), UNSCORED, np.float32)
        inputs[:, :length, : self.bits] = vectors
        inputs[:, length, self.bits] = repeats / self.most_repeats
        labels[:, length + 1 :] = 0
        labels[:, length + 1 : -1, : self.bits] = np.tile(vectors, (1, repeats, 1))
        labels[:, -1, self.bits] = 1
        return BitBatch(inputs, labels)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, most_repeats={self.most_repeats})"


class RecallTask(BitTask):
    """A list of items, then one of them again: which came behind it (Graves et al., 2014)?

    Args:
        bits: Bits of a vector.
        longest: Most items.
        item_length: Vectors of an item.
    """

    name = "recall"
    shortest = 2

    def __init__(self, bits: int, longest: int, item_length: int):
        super().__init__(bits, longest)
        if item_length < 1:
            raise ConfigError("items without content", "--item_length", "at least 1", item_length)
        if 2 ** (bits * item_length) < 2 * longest:
            raise ConfigError("items cannot all differ", "--bits", "more, or longer items", bits)
        self.item_length = item_length
        self.input_size = bits + 2

    def slots(self, length: int) -> int:
        return length * self.item_length

    def draw(self, rng: np.random.Generator, size: int, length: int) -> BitBatch:
        items = np.stack([self._different(rng, length) for _ in range(size)])  # [B, items, vectors, bits]
        asked = rng.integers(0, length - 1, size)
        block = self.item_length + 1
        steps = (length + 1) * block + 1 + self.item_length
        inputs = np.zeros((size, steps, self.input_size), np.float32)
        labels = np.full((size, steps, self.bits), UNSCORED, np.float32)
        for item in range(length + 1):
            start = item * block
            query = item == length
            inputs[:, start, self.bits + query] = 1
            vectors = items[np.arange(size), asked] if query else items[:, item]
            inputs[:, start + 1 : start + block, : self.bits] = vectors
        inputs[:, (length + 1) * block, self.bits + 1] = 1
        labels[:, -self.item_length :] = items[np.arange(size), asked + 1]
        return BitBatch(inputs, labels)

    def _different(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Items of which no two are alike."""
        while True:
            items = rng.integers(0, 2, (length, self.item_length, self.bits))
            if len(np.unique(items.reshape(length, -1), axis=0)) == length:
                return items.astype(np.float32)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, item_length={self.item_length})"
