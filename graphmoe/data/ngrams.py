"""Texts as hashed words and as counts of hashed n-grams: no vocabulary, nothing to learn, nothing to save."""

import re
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from graphmoe.data.labelled_batches import LabelledBatches
from graphmoe.errors import DataError

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


class HashedText(NamedTuple):
    """One text.

    Attributes:
        words: Bucket of each word, in order, ``[T]`` int64.
        ngrams: Buckets of its n-grams, each once, ascending, ``[M]`` int64.
        counts: How often each occurs, ``[M]`` int64.
    """

    words: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray


class HashedBatch(NamedTuple):
    """Several texts.

    Attributes:
        ids: Word buckets ``[n, T]`` int64, 0 behind the end of a text.
        mask: 1 for a word, 0 for filling, ``[n, T]`` int64.
        ngrams: Buckets of n-grams, text by text, ``[M]`` int64.
        counts: How often each occurs in its text, ``[M]`` int64.
        texts: Text of each, ``[M]`` int64, ascending.
    """

    ids: np.ndarray
    mask: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray
    texts: np.ndarray


class TextHasher:
    r"""Cuts texts into words, runs of words and runs of characters, and gives each the number
    :math:`\mathrm{crc32}(\cdot) \bmod \mathrm{buckets}` (`feature hashing
    <https://arxiv.org/abs/0902.2206>`_).

    Letters are made small. Runs of words have numbers in the lower half of ``num_ngrams``, runs of characters
    within a word, whose ends are marked, in the upper half. What meets in one bucket is one to a model.

    Args:
        num_words: Buckets of words.
        num_ngrams: Buckets of n-grams, an even number.
        word_lengths: Shortest and longest run of words.
        character_lengths: Shortest and longest run of characters, both ends of a word included.

    Raises:
        DataError: Lengths that are no range, or too few buckets.
    """

    def __init__(
        self,
        num_words: int,
        num_ngrams: int,
        *,
        word_lengths: tuple[int, int] = (1, 2),
        character_lengths: tuple[int, int] = (3, 6),
    ):
        if num_words < 1:
            raise DataError("too few buckets", "num_words", "at least 1", num_words)
        if num_ngrams < 2 or num_ngrams % 2:
            raise DataError("no two halves of buckets", "num_ngrams", "an even number >= 2", num_ngrams)
        lengths = {"word_lengths": word_lengths, "character_lengths": character_lengths}
        for name, (least, most) in lengths.items():
            if not 1 <= least <= most:
                raise DataError("no range of lengths", name, "1 <= shortest <= longest", (least, most))
        self.num_words, self.num_ngrams = num_words, num_ngrams
        self.word_lengths, self.character_lengths = word_lengths, character_lengths
        self._characters: dict[str, list[int]] = {}

    def __call__(self, text: str, length: int | None = None) -> HashedText:
        """Hash a text.

        Args:
            text: The text.
            length: Most words that are kept in order; all by default. All n-grams are counted.

        Raises:
            DataError: There is no word in it.
        """
        words = _WORD.findall(text.lower())
        if not words:
            raise DataError("no word in a text", "text", "letters, digits or signs", text[:40])
        half = self.num_ngrams // 2
        runs = [crc32(run.encode()) % half for run in _runs(words, self.word_lengths, " ")]
        for word in words:
            runs += self._of_word(word)
        ngrams, counts = np.unique(np.array(runs, dtype=np.int64), return_counts=True)
        ids = np.array([crc32(word.encode()) % self.num_words for word in words[:length]], dtype=np.int64)
        return HashedText(ids, ngrams, counts.astype(np.int64))

    def _of_word(self, word: str) -> list[int]:
        """Buckets of the runs of characters of a word, which are found once."""
        if word not in self._characters:
            half = self.num_ngrams // 2
            runs = _runs(f"<{word}>", self.character_lengths, "")
            self._characters[word] = [half + crc32(run.encode()) % half for run in runs]
        return self._characters[word]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_words:,} words, {self.num_ngrams:,} n-grams)"


def gather(texts: Sequence[HashedText]) -> HashedBatch:
    """Put texts side by side; none gives a batch of no texts."""
    lengths = np.array([text.words.size for text in texts], dtype=np.int64)
    mask = (np.arange(lengths.max(initial=1)) < lengths[:, None]).astype(np.int64)
    ids = np.zeros(mask.shape, dtype=np.int64)
    nothing = [np.empty(0, dtype=np.int64)]
    ids[mask > 0] = np.concatenate(nothing + [text.words for text in texts])
    sizes = [text.ngrams.size for text in texts]
    return HashedBatch(
        ids,
        mask,
        np.concatenate(nothing + [text.ngrams for text in texts]),
        np.concatenate(nothing + [text.counts for text in texts]),
        np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
    )


class HashedBatches(LabelledBatches):
    """Hashed texts and their labels, in the order of their base class.

    Batches are ``(HashedBatch, labels [n])``.

    Args:
        texts: The texts.
        labels: Class of each, ``[n]``.
        seed: Seed of the order.

    Raises:
        DataError: As :class:`~graphmoe.data.labelled_batches.LabelledBatches`.
    """

    def __init__(self, texts: Sequence[HashedText], labels: np.ndarray, *, seed: int = 0):
        super().__init__([text.words for text in texts], labels, pad=0, seed=seed)
        self.texts = list(texts)

    def _gather(self, chosen: np.ndarray) -> tuple[HashedBatch, np.ndarray]:
        return gather([self.texts[index] for index in chosen.tolist()]), self.labels[chosen]


def document_frequency(texts: Sequence[HashedText], num_ngrams: int) -> np.ndarray:
    """In how many texts each n-gram occurs, ``[num_ngrams]`` int64."""
    found = [np.empty(0, dtype=np.int64)] + [text.ngrams for text in texts]
    return np.bincount(np.concatenate(found), minlength=num_ngrams)


def _runs(parts: Sequence[str], lengths: tuple[int, int], between: str) -> list[str]:
    return [
        between.join(parts[start : start + size])
        for size in range(lengths[0], lengths[1] + 1)
        for start in range(len(parts) - size + 1)
    ]
