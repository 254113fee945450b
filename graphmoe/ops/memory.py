"""Memory for the large tensors of a step, which the next step gets again."""

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a tensor gets a block of its own; below it the pages are few and mostly recycled."""

KEPT = 1 << 28
"""Bytes of free blocks that wait for a tensor; what comes back beyond it goes to the system, the oldest
first."""

_HUGE_PAGE = 1 << 21
_CLASSES = 8  # sizes of blocks between one power of two and the next: an eighth is lost at most


class Blocks:
    """Free blocks of anonymous memory, and where they came from.

    A block that :meth:`take` lends is free again once its last tensor is gone: the storage of the tensor
    holds an object whose finalizer brings the block back. A finalizer may run anywhere, in any thread and in
    the middle of a method of this class, so nobody waits for the lock: who does not get it does without.

    Args:
        kept: Bytes of free blocks at most.
    """

    def __init__(self, kept: int):
        self.kept = kept
        self._free: list[mmap.mmap] = []  # the oldest first
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> ctypes.Array:
        """At least ``size`` bytes, with whatever was in them."""
        size = _rounded(size)
        block = self._pop(size) or _map(size)
        handle = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(handle, self._give_back, block).atexit = False
        return handle

    def free(self) -> int:
        """Bytes of the free blocks."""
        return sum(map(len, [*self._free, *self._returned]))

    def clear(self) -> None:
        """Give all free blocks to the system. A lock that another thread held when the process forked is
        replaced too, as that thread is not here to open it."""
        self._free, self._returned, self._lock = [], deque(), threading.Lock()

    def _pop(self, size: int) -> mmap.mmap | None:
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._collect()
            # The latest one is the likeliest to be in a cache.
            for place in reversed(range(len(self._free))):
                if len(self._free[place]) == size:
                    return self._free.pop(place)
            return None
        finally:
            self._lock.release()

    def _give_back(self, block: mmap.mmap) -> None:
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        total = sum(map(len, self._free))
        while total > self.kept:
            total -= len(self._free.pop(0))  # unmapped with its last reference


def _rounded(size: int) -> int:
    """The next of the sizes that blocks have: whole huge pages, ``_CLASSES`` sizes an octave."""
    step = max(_HUGE_PAGE, (1 << (size - 1).bit_length() - 1) // _CLASSES)
    return -(-size // step) * step


def _map(size: int) -> mmap.mmap:
    # Not shared: a forked process gets a copy of its own.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Pages are mapped on first touch, which takes longer than filling them; huge ones make that about 5 times
    # cheaper. The system is free to ignore the advice, or not to know it.
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_BLOCKS = Blocks(KEPT) if sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") else None
if _BLOCKS is not None:
    os.register_at_fork(after_in_child=_BLOCKS.clear)


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor of the dtype and device of ``like``.

    On a Linux CPU a large one gets memory that a former one left. Memory fresh from the system is mapped page
    by page on first touch, and the gradients and hidden rows of every step would be fresh again. Such a
    tensor is one like any other, but that its storage cannot grow, as that of a NumPy array cannot.
    """
    numel = math.prod(shape)
    if _BLOCKS is None or like.device.type != "cpu" or numel * like.itemsize < LARGE:
        return like.new_empty(shape)
    try:
        block = _BLOCKS.take(numel * like.itemsize)
    except OSError:  # no memory: torch says so in its own words
        return like.new_empty(shape)
    storage = torch.frombuffer(block, dtype=like.dtype, count=numel).untyped_storage()
    return like.new_empty(0).set_(storage, 0, shape)  # no view, which autograd would watch
