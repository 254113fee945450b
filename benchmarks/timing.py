"""Timing several functions side by side in one process."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

BUDGET = 8.0
"""Seconds of timed rounds a function may take; a slow one gets fewer rounds, at least 3."""


def side_by_side(work: Mapping[str, Callable[[], object]], *, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each function; they take turns, so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {}
    turns: dict[str, int] = {}
    for name, function in work.items():
        _clock(function)  # warm-up
        seconds = _clock(function)
        times[name], turns[name] = [], max(3, min(rounds, int(BUDGET / max(seconds, 1e-9))))
    for turn in range(rounds):
        for name, function in work.items():
            if turn < turns[name]:
                times[name].append(1e3 * _clock(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _clock(function: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


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
