"""Several arrays of token ids read as one, without ever copying them into memory."""

import mmap
import operator
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

RESIDENT = 1 << 23  # bytes of mapped files that reading may keep in memory before it lets go of them
FAULT = 1 << 21  # bytes that the system may map for a single one, which can be a huge page
DROP = getattr(mmap, "MADV_DONTNEED", None)


class ShardedTokens:
    """One-dimensional view of memory-mapped shards, end to end, as if they were a single array.

    Integers and slices read as from a NumPy array, across the borders of shards, and return copies or
    read-only views in ``dtype``. A page of a mapped file counts as memory of the process that read it;
    so after about ``RESIDENT`` bytes the pages are handed back to the system's cache, where the next
    reader finds them. However much is read, memory stays small.

    Args:
        shards: Token ids, each ``[tokens]`` of any integer dtype and byte order.
        dtype: The dtype to read them in; it has to hold every id. By default the one that NumPy
            would give their concatenation.
    """

    ndim = 1

    def __init__(self, shards: Sequence[np.ndarray], dtype: np.dtype | type | None = None):
        self.dtype = np.dtype(dtype) if dtype is not None else np.result_type(*shards)
        self._maps = list(shards)
        self._arrays = [np.asarray(shard) for shard in shards]  # slices of a memmap cost 10 times as much
        self._ends = list(accumulate((array.size for array in self._arrays), initial=0))
        self._touched: set[int] = set()
        self._resident = 0

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int]:
        """``(size,)``."""
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | slice) -> np.ndarray | np.integer:
        """One token, or an array of those that a slice names."""
        if not isinstance(key, slice):
            index = operator.index(key)
            if not -self.size <= index < self.size:
                raise IndexError(f"token {index} of {self.size}")
            index %= self.size
            return self._read(index, index + 1)[0]
        picked = range(self.size)[key]
        if not picked:
            return np.empty(0, self.dtype)
        if picked.step == 1:
            return self._read(picked.start, picked.stop)
        first, last = min(picked[0], picked[-1]), max(picked[0], picked[-1])
        return self._read(first, last + 1)[:: picked.step]

    def part(self, start: int, stop: int) -> "ShardedTokens":
        """The tokens from ``start`` to ``stop``, as a view that copies nothing."""
        start, stop, _ = slice(start, stop).indices(self.size)
        kept = [
            shard[max(0, start - begin) : max(0, stop - begin)]
            for shard, begin in zip(self._maps, self._ends[:-1], strict=True)
        ]
        return ShardedTokens([shard for shard in kept if shard.size] or kept[:1], self.dtype)

    def release(self) -> None:
        """Hand the pages that were read back to the system; the next read finds them in its cache."""
        for index in self._touched:
            release(self._maps[index])
        self._touched.clear()
        self._resident = 0

    def tolist(self) -> list[int]:
        """All tokens as Python integers."""
        return self[:].tolist()

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("shards can only be copied into one array")
        return np.array(self[:], dtype=dtype)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, which are in range and at least one."""
        if self._resident > RESIDENT:  # not after reading: what is handed out has yet to be looked at
            self.release()
        first = bisect_right(self._ends, start) - 1
        pieces = []
        for index in range(first, len(self._arrays)):
            begin = self._ends[index]
            if begin >= stop:
                break
            piece = self._arrays[index][max(0, start - begin) : stop - begin]
            self._resident += piece.nbytes + FAULT
            self._touched.add(index)
            pieces.append(piece.astype(self.dtype, copy=False))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:,} tokens, {len(self._maps)} shards, {self.dtype})"


def release(tokens: np.ndarray | ShardedTokens) -> None:
    """Hand the pages of an array mapped for reading back to the system; anything else is left alone."""
    if isinstance(tokens, ShardedTokens):
        tokens.release()
    # The result of arithmetic on a mapped array is in memory; a private copy would lose its changes.
    elif (
        DROP is not None and isinstance(tokens, np.memmap) and tokens._mmap is not None and tokens.mode == "r"
    ):
        tokens._mmap.madvise(DROP)
