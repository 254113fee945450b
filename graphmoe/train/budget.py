"""When a budget of edges begins to count: first learn, then save."""

import torch
from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.train.loop import Callback, TrainState


class BudgetRamp(Callback):
    """Raises the buffers ``budget_strength`` of a model, factors of its budget loss and of the floor of its
    edges, from 0 to 1 while it trains.

    A router that has to save edges before it has learned anything sends all tokens to one expert. The factor
    is a function of the step alone.

    Args:
        begin, end: Fractions of the run between which the factor rises, ``0 <= begin <= end <= 1``.

    Raises:
        ConfigError: Fractions out of order.
    """

    def __init__(self, begin: float, end: float):
        if not 0 <= begin <= end <= 1:
            raise ConfigError("fractions out of order", "budget_begin", f"from 0 to {end}", begin)
        self.begin, self.end = begin, end

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self._move(state, model)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        self._move(state, model)

    @torch.no_grad()
    def _move(self, state: TrainState, model: nn.Module) -> None:
        done = state.step / state.max_steps
        width = self.end - self.begin
        strength = float(done >= self.end) if not width else min(1.0, max(0.0, (done - self.begin) / width))
        for name, buffer in model.named_buffers():
            if name.split(".")[-1] == "budget_strength":
                buffer.fill_(strength)
