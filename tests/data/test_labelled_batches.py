"""Batches of labelled texts: a pure function of seed and step, little padding, nothing lost."""

import numpy as np
import pytest

from graphmoe.data.labelled_batches import LabelledBatches, encode_texts
from graphmoe.data.tokenizer import build_tokenizer
from graphmoe.errors import DataError


def rows_of(count: int) -> list[np.ndarray]:
    """Texts whose first token is their number."""
    lengths = np.random.default_rng(0).integers(1, 40, count)
    return [
        np.r_[number, np.full(length - 1, 999)].astype(np.uint16) for number, length in enumerate(lengths)
    ]


def batches_of(count: int = 103, **options) -> LabelledBatches:
    return LabelledBatches(rows_of(count), np.arange(count) % 3, pad=7, **options)


def test_an_epoch_has_every_text_at_most_once():
    batches = batches_of()
    for epoch in range(3):
        seen = [int(row) for step in range(12) for row in batches.batch(12 * epoch + step, 8).ids[:, 0]]
        assert len(seen) == len(set(seen)) == 96
    assert len({tuple(batches.batch(step, 8).ids[:, 0]) for step in range(36)}) == 36


def test_a_batch_is_what_it_says():
    batches, rows = batches_of(), rows_of(103)
    for step in range(5):
        ids, mask, labels = batches.batch(step, 8)
        assert ids.dtype == mask.dtype == labels.dtype == np.int64
        for row, present, label in zip(ids, mask.astype(bool), labels, strict=True):
            number = row[0]
            assert (row[present] == rows[number]).all() and label == number % 3
            assert (row[~present] == 7).all() and (np.diff(present.astype(int)) <= 0).all()


def test_batches_depend_on_seed_and_step_only():
    first, again, other = batches_of(seed=1), batches_of(seed=1), batches_of(seed=2)
    steps = [30, 2, 17, 2, 0]
    for step in steps:
        for one, two in zip(first.batch(step, 8), again.batch(step, 8), strict=True):
            assert np.array_equal(one, two)
    assert not np.array_equal(first.batch(0, 8).labels, other.batch(0, 8).labels)
    whole = first.batch(3, 8)
    parts = [first.batch(3, 8, slots) for slots in (slice(0, 4), range(4, 8))]
    assert np.concatenate([part.labels for part in parts]).tolist() == whole.labels.tolist()
    assert [row[0] for part in parts for row in part.ids] == whole.ids[:, 0].tolist()


def test_texts_of_a_batch_are_of_similar_length():
    batches = batches_of(1000)
    filled = np.mean([batches.batch(step, 16).mask.mean() for step in range(60)])
    assert filled > 0.8  # of random batches about half


def test_evaluation_sees_every_text_once():
    batches = batches_of()
    seen = np.concatenate([batch.ids[:, 0] for batch in batches.sequential(10)])
    assert sorted(seen) == list(range(103))


def test_fewer_texts_than_a_batch():
    batches = batches_of(3)
    for step in range(4):
        assert set(batches.batch(step, 8).ids[:, 0]) == {0, 1, 2}


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_texts_become_ids_and_back(name):
    texts = ["def f(x):\n    return x", "grün <|endoftext|> 1", "a" * 70_000, "b"]
    tokenizer = build_tokenizer(name, texts, 300)
    rows = encode_texts(tokenizer, texts, name, 100_000)
    assert [tokenizer.decode(row.tolist()) for row in rows] == texts
    short = encode_texts(tokenizer, texts, name, 5)
    assert [row.tolist() for row in short] == [row[:5].tolist() for row in rows]
    assert all(tokenizer.eos_token_id not in row for row in rows)


def test_wrong_input():
    with pytest.raises(DataError, match="labels: not one label a text; expected 2; got 1"):
        LabelledBatches(rows_of(2), np.zeros(1), pad=0)
    with pytest.raises(DataError, match="labels: not one label a text"):
        LabelledBatches([], np.zeros(0), pad=0)
    with pytest.raises(DataError, match="seed"):
        batches_of(seed=-1)
    with pytest.raises(DataError, match="no such batch"):
        batches_of().batch(-1, 8)
    with pytest.raises(DataError, match="batch_size"):
        next(batches_of().sequential(0))
