"""Hashed words and n-grams: counted as a double loop counts them, the same everywhere."""

from collections import Counter
from zlib import crc32

import numpy as np
import pytest

from graphmoe.data.ngrams import HashedBatches, TextHasher, document_frequency, gather
from graphmoe.errors import DataError

HASHER = TextHasher(50, 2000)
TEXTS = ["A fine film, a fine cast.", "don't", "It is it is", "(x) -> y_1", "Ein schöner Film"]


def bucket(text: str, buckets: int) -> int:
    return crc32(text.encode()) % buckets


@pytest.mark.parametrize("words, characters", [((1, 2), (3, 6)), ((2, 2), (1, 1)), ((1, 4), (4, 9))])
def test_counts_are_those_of_a_double_loop(words, characters):
    hasher = TextHasher(50, 2000, word_lengths=words, character_lengths=characters)
    for text, parts in (
        (TEXTS[0], ["a", "fine", "film", ",", "a", "fine", "cast", "."]),
        (TEXTS[1], ["don't"]),
        (TEXTS[3], ["(", "x", ")", "-", ">", "y_1"]),
        (TEXTS[4], ["ein", "schöner", "film"]),
    ):
        want = Counter()
        for start in range(len(parts)):
            for size in range(words[0], words[1] + 1):
                if start + size <= len(parts):
                    want[bucket(" ".join(parts[start : start + size]), 1000)] += 1
        for part in (f"<{part}>" for part in parts):
            for start in range(len(part)):
                for size in range(characters[0], characters[1] + 1):
                    if start + size <= len(part):
                        want[1000 + bucket(part[start : start + size], 1000)] += 1
        found = hasher(text)
        assert dict(zip(found.ngrams.tolist(), found.counts.tolist(), strict=True)) == want
        assert (np.diff(found.ngrams) > 0).all()
        assert found.words.tolist() == [bucket(part, 50) for part in parts]


def test_only_the_words_in_order_are_cut_short():
    whole, short = HASHER(TEXTS[0]), HASHER(TEXTS[0], 3)
    assert np.array_equal(short.words, whole.words[:3]) and np.array_equal(short.ngrams, whole.ngrams)


def test_texts_side_by_side():
    texts = [HASHER(text) for text in TEXTS]
    batch = gather(texts)
    assert batch.ids.shape == batch.mask.shape == (5, 8)
    for number, text in enumerate(texts):
        present = batch.mask[number].astype(bool)
        assert (
            np.array_equal(batch.ids[number][present], text.words) and not batch.ids[number][~present].any()
        )
        mine = batch.texts == number
        assert np.array_equal(batch.ngrams[mine], text.ngrams)
        assert np.array_equal(batch.counts[mine], text.counts)
    assert (np.diff(batch.texts) >= 0).all()
    assert {part.dtype for part in batch} == {np.dtype(np.int64)}
    assert gather([]).ids.shape == (0, 1) and gather([]).ngrams.size == 0


def test_document_frequency():
    texts = [HASHER(text) for text in TEXTS]
    frequency = document_frequency(texts, 2000)
    want = [sum(number in text.ngrams for text in texts) for number in range(2000)]
    assert frequency.tolist() == want and document_frequency([], 4).tolist() == [0, 0, 0, 0]


def test_batches_are_the_texts_and_their_labels():
    texts = [HASHER(f"{'word ' * (1 + number % 7)}{number}") for number in range(40)]
    batches = HashedBatches(texts, np.arange(40), seed=3)
    seen = []
    for step in range(5):
        batch, labels = batches.batch(step, 8)
        again = gather([texts[label] for label in labels])
        assert all(np.array_equal(one, two) for one, two in zip(batch, again, strict=True))
        part, some = batches.batch(step, 8, slice(4, 8))
        assert np.array_equal(some, labels[4:]) and part.texts.max() == 3
        seen += labels.tolist()
    assert sorted(seen) == list(range(40))
    assert sum(len(labels) for _, labels in batches.sequential(7)) == 40
    other = HashedBatches(texts, np.arange(40), seed=4)
    assert not np.array_equal(other.batch(0, 8)[1], batches.batch(0, 8)[1])


@pytest.mark.parametrize(
    "arguments, options, match",
    [
        ((0, 10), {}, "num_words: too few buckets"),
        ((10, 7), {}, "num_ngrams: no two halves"),
        ((10, 0), {}, "num_ngrams: no two halves"),
        ((10, 10), {"word_lengths": (2, 1)}, "word_lengths: no range"),
        ((10, 10), {"character_lengths": (0, 3)}, "character_lengths: no range"),
    ],
)
def test_wrong_sizes(arguments, options, match):
    with pytest.raises(DataError, match=match):
        TextHasher(*arguments, **options)


def test_a_text_without_words():
    with pytest.raises(DataError, match="no word in a text"):
        HASHER(" \n ")
