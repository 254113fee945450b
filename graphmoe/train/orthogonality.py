"""How strong the orthogonality losses are during training."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.metrics import random_specialisation, specialisation
from graphmoe.train.flags import suggestion
from graphmoe.train.loop import Callback, TrainState
from graphmoe.typing import Record

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "exponential": lambda t: math.exp(-5 * t),
    "step": lambda t: 0.5 ** math.floor(4 * t),
}
"""Factor of the strength where the fraction ``t`` of all steps is done."""


class OrthogonalityWarmup(Callback):
    """Raises the strength of the orthogonality losses linearly from 0 to 1 over ``steps`` steps.

    The strength is computed from the step each time, never from its last value.
    """

    def __init__(self, steps: int):
        self.steps = max(steps, 1)

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        model.orthogonality_strength.fill_(min(1.0, state.step / self.steps))

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        self.on_start(state, model)


class AdaptiveOrthogonality(Callback):
    """Adapts the strength of the orthogonality losses to how specialised the experts are.

    Each step it hands the relative specialisation of every layer, with figures of all ranks, to the
    model's :class:`~graphmoe.nn.OrthogonalityStrength` and makes the strengths that follow the
    effective ones. All state is in buffers of the model, so a resumed run repeats an uninterrupted
    one bit for bit.

    Args:
        schedule: Factor over time, one of :data:`SCHEDULES`.
        max_steps: Optimiser steps of the run.
        warmup_steps: Steps over which the factor is raised linearly from 0.

    Raises:
        ConfigError: Unknown schedule; at the start of training also a model without adaptive strength.
    """

    def __init__(self, schedule: str, *, max_steps: int, warmup_steps: int = 0):
        if schedule not in SCHEDULES:
            what = f"unknown schedule{suggestion(str(schedule), list(SCHEDULES))}"
            raise ConfigError(what, "orthogonality_schedule", f"one of {', '.join(SCHEDULES)}", schedule)
        self.schedule, self.max_steps, self.warmup_steps = schedule, max_steps, warmup_steps

    def time(self, step: int) -> float:
        """Factor of the strength after ``step`` optimiser steps: warm-up times schedule, in [0, 1]."""
        warm = min(1.0, step / max(self.warmup_steps, 1)) if self.warmup_steps > 0 else 1.0
        return warm * SCHEDULES[self.schedule](min(1.0, step / max(self.max_steps, 1)))

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if getattr(model, "orthogonality", None) is None:
            raise ConfigError("the model's strength is static", "orthogonality_adaptive", True, False)
        model.orthogonality.begin(self.time(0))
        self._apply(model)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if not outputs.records:  # a dense model
            return
        means = [_all_ranks(state, record) for record in outputs.records]
        model.orthogonality.observe(relative_specialisation(means), self.time(state.step))
        self._apply(model)

    @torch.no_grad()
    def _apply(self, model: nn.Module) -> None:
        # The loss multiplies the buffer by its coefficient, which is the base.
        model.orthogonality_strength.copy_(model.orthogonality() / model.orthogonality.base)


@torch.no_grad()
def relative_specialisation(means: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Specialisation of each layer over that of as many random vectors of as many channels, ``[L]``.

    Args:
        means: Mean output ``[E, D]`` and number of rows ``[E]`` of the experts of each layer; experts
            without rows do not count. With fewer than two that do, specialisation is 0.
    """
    served = [rows > 0 for _, rows in means]
    values = torch.stack([specialisation(mean, s) for (mean, _), s in zip(means, served, strict=True)])
    counts = torch.stack([s.sum() for s in served]).tolist()
    chance = [
        random_specialisation(count, mean.size(1)) if count > 1 else 1.0
        for count, (mean, _) in zip(counts, means, strict=True)
    ]
    return values / values.new_tensor(chance)


def _all_ranks(state: TrainState, record: Record) -> tuple[Tensor, Tensor]:
    """Mean outputs and rows of the global batch: means of the ranks weighted by the rows behind them."""
    mean, rows = record.expert_mean.detach(), record.routing.ptr.diff()
    if state.accelerator.num_processes == 1:
        return mean, rows
    total = state.accelerator.reduce(mean * rows.unsqueeze(1), "sum")
    rows = state.accelerator.reduce(rows, "sum")
    return total / rows.unsqueeze(1).clamp(min=1), rows
