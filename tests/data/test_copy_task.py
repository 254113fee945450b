import pytest
import torch

from graphmoe.data.copy_task import CopyTask
from graphmoe.errors import DataError


def test_what_is_said_again_is_what_was_said():
    task = CopyTask(20, 3, 9)
    batch = task.batch(4, 50, slice(0, 50))
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    lengths = set()
    for row, present, label in zip(ids, mask.bool(), labels, strict=True):
        n = int((row == task.delimiter).nonzero())
        lengths.add(n)
        assert (row[:n] >= 1).all() and (row[:n] <= 20).all()
        assert (row[n + 1 : 2 * n + 1] == task.blank).all()
        assert torch.equal(label[n + 1 : 2 * n + 1], row[:n])
        assert (label[: n + 1] == -100).all() and (label[2 * n + 1 :] == -100).all()
        assert present[: 2 * n + 1].all() and not present[2 * n + 1 :].any()
    assert lengths == set(range(3, 10))
    assert task.vocab_size == 23 and "3 to 9 of 20" in task.describe()


def test_a_batch_is_a_function_of_seed_part_index_and_slot():
    task = CopyTask(20, 3, 9, seed=1)
    whole = task.batch(2, 8, slice(0, 8))["input_ids"]
    part = task.batch(2, 8, slice(4, 8))["input_ids"]
    assert torch.equal(whole[4:, : part.size(1)], part)
    again = CopyTask(20, 3, 9, seed=1)
    assert torch.equal(again.batch(2, 8, slice(0, 8))["input_ids"], whole)
    others = [
        CopyTask(20, 3, 9, seed=2),
        *(CopyTask(20, 3, 9, seed=1, part=part) for part in ("test", "validation")),
    ]
    assert len({t.fingerprint for t in (task, *others)}) == 4
    assert task.fingerprint == again.fingerprint
    assert not torch.equal(
        task.batch(3, 8, slice(0, 1))["input_ids"], task.batch(2, 8, slice(0, 1))["input_ids"]
    )
    assert task.batch(0, 4, slice(0, 0))["input_ids"].shape == (0, 1)


def test_wrong_input():
    with pytest.raises(DataError, match="num_tokens: nothing to remember"):
        CopyTask(1)
    with pytest.raises(DataError, match="min_length: lengths out of order"):
        CopyTask(min_length=9, max_length=3)
    with pytest.raises(DataError, match="seed: no seed"):
        CopyTask(seed=-1)
    with pytest.raises(DataError, match="part: unknown part; expected one of train, test"):
        CopyTask(part="dev")
