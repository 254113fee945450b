import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError

MARGIN, DROP = 0.02, 0.1  # of relative specialisation: around the target, and between two windows


class OrthogonalityStrength(nn.Module):
    r"""Strength of the orthogonality loss of each layer, adapted to how specialised its experts are.

    .. math::
        \lambda_l = \mathrm{clamp}\bigl(\mathrm{base} \cdot \mathrm{decay}^l \cdot \mathrm{time}
            \cdot \mathrm{perf}_l \cdot \mathrm{emergency}_l,\ \mathrm{low},\ \mathrm{high}\bigr)

    every ``interval`` optimiser steps, and always from ``base``: were it computed from its last
    value, a layer just short of the target would compound 1.5 into the ceiling. With :math:`s_l` the
    mean specialisation of a layer over the interval, ``perf`` is 1.5 where :math:`s_l` is more than
    0.02 short of the target, 0.7 where it is more than 0.02 beyond, else 1; ``emergency`` is 2 where
    :math:`s_l` fell by more than 0.1 since the interval before, else 1.

    Specialisation is relative: :func:`~graphmoe.metrics.specialisation` of mean outputs over that of
    random vectors of the same shape, so 1 means as different as chance makes them. The measure
    itself has no common scale: orthogonal experts have about ``(1 - 1 / (E - 1)) * (1 - 1 / E)``, 0.5
    for four and 0.75 for eight, so few experts could never come near a target of 0.95.

    ``forward`` changes nothing; state moves in :meth:`observe`, which a training callback calls once
    after each optimiser step, on every rank with equal arguments.

    Args:
        num_layers: ``L``.
        base: Strength of layer 0 on target.
        decay: Factor from one layer to the next, in (0, 1].
        interval: Optimiser steps averaged over, and between two adjustments.
        target: Relative specialisation to reach, in (0, 1].
        low, high: Bounds of the strength, ``0 < low <= high``.

    Shapes:
        - **input:** none; **output:** strengths ``[L]``.

    Raises:
        ConfigError: An argument out of range; it is named ``orthogonality_...``.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        base: float = 0.1,
        decay: float = 0.8,
        interval: int = 500,
        target: float = 0.95,
        low: float = 1e-3,
        high: float = 0.3,
    ):
        super().__init__()
        if not base >= 0:
            raise ConfigError("negative strength", "orthogonality_base", ">= 0", base)
        if not 0 < decay <= 1:
            raise ConfigError("factor per layer out of range", "orthogonality_decay", "0 < decay <= 1", decay)
        if interval < 1:
            raise ConfigError("interval too short", "orthogonality_interval", "at least 1 step", interval)
        if not 0 < target <= 1:
            raise ConfigError("target out of range", "orthogonality_target", "0 < target <= 1", target)
        if not low > 0:
            raise ConfigError("least strength must be positive", "orthogonality_min", "> 0", low)
        if not high >= low:
            raise ConfigError("bounds cross", "orthogonality_max", f"at least {low}", high)
        self.num_layers, self.base, self.decay = num_layers, base, decay
        self.interval, self.target, self.low, self.high = interval, target, low, high
        self.register_buffer("strength", torch.zeros(num_layers))
        self.register_buffer("total", torch.zeros(num_layers))
        self.register_buffer("previous", torch.zeros(num_layers))
        self.register_buffer("observed", torch.zeros((), dtype=torch.long))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.begin(1.0)

    def forward(self) -> Tensor:
        return self.strength.clone()

    def first(self, time: float) -> Tensor:
        """Strengths of the first interval ``[L]``; arguments as :meth:`begin`."""
        return self._bounded(torch.full_like(self.strength, time))

    @torch.no_grad()
    def begin(self, time: float) -> None:
        """Set the strengths of the first interval; does nothing once a step was observed.

        Args:
            time: Factor of the schedule at step 0.
        """
        self.strength.copy_(torch.where(self.observed == 0, self.first(time), self.strength))

    @torch.no_grad()
    def observe(self, specialisation: Tensor, time: float) -> None:
        """Take in one optimiser step; at the end of an interval adjust all strengths.

        Args:
            specialisation: Relative specialisation of each layer, ``[L]``.
            time: Factor of the schedule at this step.
        """
        self.total += specialisation.to(self.total)
        self.observed += 1
        full = self.observed % self.interval == 0  # arithmetic only, so no device sync
        mean = self.total / self.interval
        factor = torch.where(
            mean < self.target - MARGIN, 1.5, torch.where(mean > self.target + MARGIN, 0.7, 1)
        )
        fell = (self.observed > self.interval) & (mean < self.previous - DROP)
        factor = factor * torch.where(fell, 2, 1) * time
        self.strength.copy_(torch.where(full, self._bounded(factor), self.strength))
        self.previous.copy_(torch.where(full, mean, self.previous))
        self.total.copy_(torch.where(full, 0, self.total))

    def _bounded(self, factor: Tensor) -> Tensor:
        layer = torch.arange(self.num_layers, device=factor.device)
        return (self.base * self.decay**layer * factor).clamp(self.low, self.high).to(self.strength)

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, base={self.base}, decay={self.decay}, interval={self.interval}, "
            f"target={self.target}, low={self.low}, high={self.high}"
        )
