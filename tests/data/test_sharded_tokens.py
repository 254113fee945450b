import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graphmoe.data import TokenWindows
from graphmoe.data.corpus import Corpus, chunks, fingerprint, unigram_loss
from graphmoe.data.sharded_tokens import ShardedTokens, release

SIZES = (7, 1, 40, 3, 52)
DTYPES = ("u1", "<i8", ">i4", "<u2", "i1")
WHOLE = np.arange(sum(SIZES), dtype=np.uint8)


@pytest.fixture(params=["mapped", "in memory"])
def tokens(request, tmp_path) -> ShardedTokens:
    """The tokens 0, 1, 2, ... in shards of different sizes, dtypes and byte orders."""
    shards = []
    for index, part in enumerate(np.split(WHOLE, np.cumsum(SIZES)[:-1])):
        np.save(tmp_path / f"{index}.npy", part.astype(DTYPES[index]))
        shards.append(
            np.load(tmp_path / f"{index}.npy", mmap_mode="r" if request.param == "mapped" else None)
        )
    return ShardedTokens(shards, np.uint8)


def test_reads_like_the_concatenation(tokens):
    assert (len(tokens), tokens.size, tokens.shape, tokens.ndim) == (103, 103, (103,), 1)
    assert repr(tokens) == "ShardedTokens(103 tokens, 5 shards, uint8)"
    rng = np.random.default_rng(0)
    ends = [None, *range(-110, 111)]
    for _ in range(2000):
        key = slice(rng.choice(ends), rng.choice(ends), rng.choice([None, 1, 2, 7, -1, -3]))
        read = tokens[key]
        assert type(read) is np.ndarray and read.dtype == np.uint8
        np.testing.assert_array_equal(read, WHOLE[key])
    assert [tokens[index] for index in range(-103, 103)] == [*range(103), *range(103)]
    assert list(tokens) == tokens.tolist() == WHOLE.tolist()
    np.testing.assert_array_equal(np.asarray(tokens, dtype=np.int64), WHOLE)


@pytest.mark.parametrize(
    "key, error", [(103, IndexError), (-104, IndexError), (1.5, TypeError), ([1], TypeError)]
)
def test_bad_keys(tokens, key, error):
    with pytest.raises(error):
        tokens[key]


def test_array_without_a_copy_is_refused(tokens):
    with pytest.raises(ValueError, match="only be copied"):
        np.asarray(tokens, copy=False)


def test_parts_are_views(tokens):
    for start in range(0, 104, 3):
        for stop in range(start, 104, 5):
            part = tokens.part(start, stop)
            assert part.tolist() == WHOLE[start:stop].tolist() and part.dtype == np.uint8
    assert np.shares_memory(tokens.part(8, 48)._arrays[0], tokens._arrays[2])


def test_default_dtype_is_that_of_the_concatenation():
    assert ShardedTokens([np.zeros(2, np.uint8), np.zeros(2, np.int16)]).dtype == np.int16


def test_the_rest_of_the_library_reads_it_as_an_array(tokens, monkeypatch):
    monkeypatch.setattr("graphmoe.data.corpus.CHUNK", 10)
    assert np.concatenate(list(chunks(tokens))).tolist() == WHOLE.tolist()
    assert fingerprint(tokens, tokens.part(0, 9), None) == fingerprint(WHOLE, WHOLE[:9], None)
    corpora = [
        Corpus("tiny", each, each, None, 128, None, (1, 1), fingerprint=fingerprint(each, each, None))
        for each in (tokens, WHOLE)
    ]
    assert unigram_loss(corpora[0]) == unigram_loss(corpora[1])
    for ours, plain in zip(*(corpus.split_held_out() for corpus in corpora), strict=True):
        assert isinstance(ours.held_out, ShardedTokens)
        assert ours.held_out.tolist() == plain.held_out.tolist()
        assert ours.fingerprint == plain.fingerprint


@pytest.mark.parametrize("length", [1, 5, 30, 102])
def test_windows_cross_the_borders_of_shards(tokens, length):
    ours, plain = TokenWindows(tokens, length, seed=3), TokenWindows(WHOLE, length, seed=3)
    for step in range(5):
        np.testing.assert_array_equal(ours.batch(step, 8), plain.batch(step, 8))
    np.testing.assert_array_equal(ours.sequential(), plain.sequential())


def test_pages_are_let_go_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("graphmoe.data.sharded_tokens.RESIDENT", 1)
    released = []
    monkeypatch.setattr("graphmoe.data.sharded_tokens.release", lambda shard: released.append(release(shard)))
    np.save(tmp_path / "a.npy", np.arange(5000))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    tokens = ShardedTokens([mapped])
    before = tokens[10:5000]
    after = tokens[:4000]
    assert released
    np.testing.assert_array_equal(before, np.arange(10, 5000))
    np.testing.assert_array_equal(after, np.arange(4000))


def test_a_private_copy_keeps_its_changes(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(5000))
    changed = np.load(tmp_path / "a.npy", mmap_mode="c")
    changed[:] = 1
    release(changed)
    release(np.zeros(3))
    assert (changed == 1).all()


MEASURE = """
import sys
import numpy as np
from graphmoe.data import TokenWindows, load_text, unigram_loss

def resident(kind="VmRSS"):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(kind))

warm = load_text(sys.argv[2])
TokenWindows(warm.train, 256).batch(0, 8)
unigram_loss(warm)
before = resident()
corpus = load_text(sys.argv[1])
unigram_loss(corpus)
windows = TokenWindows(corpus.train, 256)
for step in range(1500):
    windows.batch(step, 32)
print(corpus.train.size, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("shards", [1, 10])
def test_memory_stays_small_however_large_the_shards(tmp_path, shards):
    for name, size in (("large", 60_000_000 // shards), ("small", 10_000)):
        (tmp_path / name).mkdir()
        for index in range(shards):
            np.save(tmp_path / name / f"{index}.npy", np.full(size, index, np.uint16))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    tokens, growth = done.stdout.split()
    assert int(tokens) >= 54_000_000  # 108 MB on the disk
    assert float(growth) < 20  # MB, mapped pages included
