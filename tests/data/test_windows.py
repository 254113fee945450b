import numpy as np
import pytest

from graphmoe.data import TokenWindows
from graphmoe.errors import DataError


def windows(size: int = 1003, length: int = 16, seed: int = 0) -> TokenWindows:
    """Windows of the tokens 0, 1, 2, ...: a window shows where it was cut."""
    return TokenWindows(np.arange(size, dtype=np.uint16), length, seed=seed)


def test_batch_holds_consecutive_tokens():
    batch = windows().batch(0, 8)
    assert batch.shape == (8, 17)
    assert batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()
    assert repr(windows()) == "TokenWindows(1,003 tokens, length=16, seed=0)"


def test_batch_does_not_depend_on_what_was_drawn_before():
    fresh = windows().batch(40, 8)
    used = windows()
    for step in (0, 99, 3, 41, 7):
        used.batch(step, 5)
    np.testing.assert_array_equal(used.batch(40, 8), fresh)
    assert not np.array_equal(windows(seed=1).batch(40, 8), fresh)


def test_slots_of_all_ranks_make_up_the_batch():
    source = windows()
    for step in range(30):  # 240 samples of 61 windows an epoch: many batches span two epochs
        whole = source.batch(step, 8)
        ranks = [source.batch(step, 8, slots) for slots in (slice(0, 3), range(3, 6), slice(6, None))]
        np.testing.assert_array_equal(np.concatenate(ranks), whole)
        np.testing.assert_array_equal(source.batch(step, 8, slice(1, None, 2)), whole[1::2])
    assert source.batch(0, 8, slice(8, None)).shape == (0, 17)


def test_an_epoch_reads_each_window_once_and_the_next_one_cuts_elsewhere():
    source = windows()
    epochs = [source.batch(step, len(source)) for step in range(4)]
    for epoch in epochs:
        starts = np.sort(epoch[:, 0])
        np.testing.assert_array_equal(np.diff(starts), 16)
        assert starts[0] < 16
    assert len({int(epoch[:, 0].min()) for epoch in epochs}) > 1
    assert len({tuple(epoch[:, 0].argsort()) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", range(9, 40))
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_any_size_that_fills_one_window_can_be_read(size, length):
    source = windows(size, length)
    batch = source.batch(0, 3 * len(source))
    assert batch.shape == (3 * len(source), length + 1)
    assert (np.diff(batch, axis=1) == 1).all()
    assert len(source.sequential()) == (size - 1) // length


def test_sequential_predicts_every_token_once():
    targets = windows(1009).sequential()[:, 1:]
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 1009))


def test_sequential_is_spread_over_the_whole_array():
    picked = windows().sequential(5)
    assert picked.shape == (5, 17)
    assert picked[0, 0] == 0
    assert (np.diff(picked[:, 0]) >= 16).all()
    assert picked[-1, 0] > 700
    np.testing.assert_array_equal(windows().sequential(1000), windows().sequential())


def test_memory_map_gives_the_same_windows(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1003, dtype=np.int32))
    mapped = TokenWindows(np.load(tmp_path / "ids.npy", mmap_mode="r"), 16)
    np.testing.assert_array_equal(mapped.batch(3, 8), windows().batch(3, 8))
    assert type(mapped.batch(3, 8)) is np.ndarray


def test_too_few_tokens_for_one_window():
    with pytest.raises(DataError, match=r"smaller than one sequence; expected at least 17 tokens.*got 16"):
        windows(size=16)


@pytest.mark.parametrize(
    "build, field",
    [
        (lambda: windows(length=0), "length"),
        (lambda: windows(seed=-1), "seed"),
        (lambda: TokenWindows(np.zeros(99), 4), "float64"),
        (lambda: TokenWindows(np.zeros((9, 9), dtype=int), 4), "tokens"),
        (lambda: windows().batch(-1, 4), "step"),
        (lambda: windows().batch(0, 0), "batch_size"),
        (lambda: windows().batch(0, 4, range(2, 5)), "slots"),
        (lambda: windows().sequential(0), "max_windows"),
    ],
)
def test_bad_arguments_are_named(build, field):
    with pytest.raises(DataError, match=field):
        build()
