"""Timing several functions side by side in one process."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

BUDGET = 8.0
"""Seconds of timed rounds a function may take; a slow one gets fewer rounds, at least 3."""

SHORT = 0.2
"""Seconds below which a turn is many calls, the first of them not timed: in a training loop a step follows
its like, not one of a larger function that has taken all caches."""


def side_by_side(work: Mapping[str, Callable[[], object]], *, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each function; they take turns, so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {}
    turns: dict[str, int] = {}
    calls: dict[str, int] = {}
    for name, function in work.items():
        _clock(function, 1)  # warm-up
        seconds = max(_clock(function, 1), 1e-9)
        times[name], turns[name] = [], max(3, min(rounds, int(BUDGET / max(seconds, SHORT))))
        calls[name] = math.ceil(SHORT / seconds)
    for turn in range(rounds):
        for name, function in work.items():
            if turn < turns[name]:
                if calls[name] > 1:
                    function()
                times[name].append(1e3 * _clock(function, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _clock(function: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - began) / calls


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward_backward(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """One forward and one backward pass with fresh gradients."""

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad)

    return step
