"""Windows of a token array, in an order that any resumed or distributed run agrees on."""

import numpy as np

from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.errors import DataError


class TokenWindows:
    """Windows of ``length`` inputs and their next tokens, in an order that depends on the seed only.

    What a batch holds is a pure function of ``(seed, step, slot)``: not of the number of workers or
    ranks, nor of what was drawn before. A resumed run therefore reads on where it stopped. Every
    epoch has its own permutation of the windows and its own offset, so that window borders move.

    Args:
        tokens: Token ids, ``[tokens]``, of any integer dtype; memory maps are read window by window.
        length: Inputs in a window; each window holds one token more, the last target.
        seed: Seed of the order, at least 0.

    Raises:
        DataError: If the tokens do not fill one window, or an argument is out of range.
    """

    def __init__(self, tokens: np.ndarray | ShardedTokens, length: int, *, seed: int = 0):
        if isinstance(tokens, np.memmap) and tokens.ndim == 1:
            tokens = ShardedTokens([tokens])  # lets go of what was read
        self.tokens = tokens if isinstance(tokens, ShardedTokens) else np.asarray(tokens)
        self.length, self.seed = length, seed
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            got = f"{self.tokens.dtype} array of shape {self.tokens.shape}"
            raise DataError("not an array of token ids", "tokens", "one dimension of integers", got)
        if length < 1:
            raise DataError("a window needs an input token", "length", "at least 1", length)
        if seed < 0:
            raise DataError("no seed of a random order", "seed", "at least 0", seed)
        if self.tokens.size < length + 1:
            expected = f"at least {length + 1} tokens ({length} inputs and the target of the last)"
            raise DataError("the corpus is smaller than one sequence", "tokens", expected, self.tokens.size)
        # One window less than fits leaves room for any offset; a corpus too short for that keeps its one.
        self._windows = max(1, self.tokens.size // length - 1)
        self._offsets = min(length, self.tokens.size - self._windows * length)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return self._windows

    def batch(self, step: int, batch_size: int, slots: slice | range | None = None) -> np.ndarray:
        """The windows of one optimiser step, or one rank's part of them.

        Args:
            step: Number of the step, from 0.
            batch_size: Windows in the whole batch, over all ranks.
            slots: Which of the ``batch_size`` windows to return; all by default.

        Returns:
            Token ids, ``[slots, length + 1]`` int64: inputs ``[:, :-1]`` and targets ``[:, 1:]``.

        Raises:
            DataError: If ``step``, ``batch_size`` or ``slots`` is out of range.
        """
        if step < 0:
            raise DataError("no such step", "step", "at least 0", step)
        if batch_size < 1:
            raise DataError("no such batch", "batch_size", "at least 1", batch_size)
        if slots is None or isinstance(slots, slice):
            slots = range(batch_size)[slots or slice(None)]
        if any(slot not in range(batch_size) for slot in slots):
            raise DataError("slots outside the batch", "slots", f"slots from 0 to {batch_size - 1}", slots)
        starts = [self._start(step * batch_size + slot) for slot in slots]
        return self._gather(starts)

    def sequential(self, max_windows: int | None = None) -> np.ndarray:
        """Windows for evaluation: in order, evenly spread, none predicting a token of another.

        Without ``max_windows`` every token but the first is a target once, up to a rest that does not
        fill a window.

        Args:
            max_windows: The most windows to return; all by default.

        Returns:
            Token ids, ``[windows, length + 1]`` int64.

        Raises:
            DataError: If ``max_windows`` is less than 1.
        """
        if max_windows is not None and max_windows < 1:
            raise DataError("nothing to evaluate on", "max_windows", "at least 1", max_windows)
        fitting = (self.tokens.size - 1) // self.length
        count = fitting if max_windows is None else min(fitting, max_windows)
        return self._gather([index * fitting // count * self.length for index in range(count)])

    def _start(self, sample: int) -> int:
        """First token of the window that comes ``sample``-th in the run."""
        epoch, index = divmod(sample, self._windows)
        offset, order = self._order(epoch)
        return offset + int(order[index]) * self.length

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        """Offset and permutation of an epoch; the last two are kept, as a batch can span two epochs."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            offset, order = int(rng.integers(self._offsets)), rng.permutation(self._windows)
            # Half the memory: shards of 10^10 tokens have some 10^8 windows.
            self._orders[epoch] = offset, order.astype(np.min_scalar_type(self._windows))
        return self._orders[epoch]

    def _gather(self, starts: list[int]) -> np.ndarray:
        """The windows that begin at ``starts``, ``[len(starts), length + 1]`` int64."""
        windows = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for window, start in zip(windows, starts, strict=True):
            window[:] = self.tokens[start : start + self.length + 1]
        return windows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tokens.size:,} tokens, length={self.length}, seed={self.seed})"
