import math
from numbers import Integral

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.loss import gram
from graphmoe.typing import NEVER

DORMANT, ACTIVATING, ACTIVE = 0, 1, 2


class GhostGate(nn.Module):
    r"""State of the ghost experts of one layer: dormant, activating or active.

    Experts ``0 .. E - G - 1`` are primary, the last ``G`` are ghosts. From moving averages over a
    window of the mean output :math:`\bar o_e` of every live expert and of the variance it leaves
    unexplained, the layer's saturation is

    .. math::
        s = \bigl(1 - \mathrm{MSE}(\cos\mathrm{Gram}(\bar o), I)\bigr)
            \cdot \mathrm{Var}_b(x - \mathrm{mean}_e\, o_e).

    When ``s`` exceeds the threshold after a full window, the first dormant ghost starts to
    activate: its level is ``min(1, rate * steps)`` and it is active at 1. The next ghost follows no
    sooner than a window later. A ghost returns to dormancy only by :meth:`reset_ghost`.

    ``forward`` and every other reader change nothing; state moves in :meth:`observe`, which a
    training callback calls once after each optimiser step, on every rank with equal arguments.

    Args:
        channels: Channels ``D`` of an expert's output.
        num_experts: ``E``, ghosts included.
        num_ghosts: ``G``.
        threshold: Saturation above which a ghost wakes.
        rate: Level gained per optimiser step, in (0, 1].
        window: Optimiser steps averaged over, and least distance between two awakenings.

    Shapes:
        - **input:** none; **output:** levels of all experts ``[E]`` float32, 1 for primaries.

    Raises:
        ConfigError: No primary left, a rate outside (0, 1], a window that is no integer of at least 1, a
            threshold that is negative or NaN.
    """

    def __init__(
        self,
        channels: int,
        num_experts: int,
        num_ghosts: int,
        *,
        threshold: float = 0.01,
        rate: float = 0.01,
        window: int = 100,
    ):
        super().__init__()
        if not 1 <= num_ghosts < num_experts:
            raise ConfigError(
                "no primary expert left", "num_ghosts", f"1 <= ghosts < {num_experts}", num_ghosts
            )
        if not 0 < rate <= 1:
            raise ConfigError("level per step out of range", "ghost_rate", "0 < rate <= 1", rate)
        if not isinstance(window, Integral) or window < 1:
            raise ConfigError("window is no number of steps", "ghost_window", "an integer >= 1", window)
        if not threshold >= 0:
            raise ConfigError(
                "threshold must not be negative", "ghost_activation_threshold", ">= 0", threshold
            )
        self.num_experts, self.num_ghosts = num_experts, num_ghosts
        self.threshold, self.window = threshold, window
        # Levels follow from integer counters: a hundred additions of 0.01 are not 1.
        self.steps_to_active = math.ceil(min(1 / rate, 2.0**62) - 1e-9)  # fits the counter
        self.rate = rate
        self.register_buffer("phase", torch.zeros(num_ghosts, dtype=torch.long))
        self.register_buffer("steps", torch.zeros(num_ghosts, dtype=torch.long))
        self.register_buffer("observed", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_wake", torch.zeros((), dtype=torch.long))
        self.register_buffer("expert_mean", torch.zeros(num_experts, channels))
        self.register_buffer("expert_seen", torch.zeros(num_experts, dtype=torch.long))
        self.register_buffer("unexplained", torch.zeros(()))

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self) -> Tensor:
        grown = (self.steps * self.rate).clamp(max=1.0)
        grown = torch.where(self.steps >= self.steps_to_active, torch.ones_like(grown), grown)
        level = torch.where(self.phase == DORMANT, torch.zeros_like(grown), grown)
        return torch.cat([level.new_ones(self.num_experts - self.num_ghosts), level])

    def offset(self) -> Tensor:
        """What to add to the router's logits ``[E]``: ``log(level)``, at least ``NEVER``."""
        level = self()
        # A fresh ghost is activating at level 0: it joins with its first step, not before.
        return torch.where(level > 0, level.clamp(min=1e-30).log(), torch.full_like(level, NEVER))

    def saturation(self) -> Tensor:
        """Saturation of the layer, scalar float32; 0 before the first observation."""
        live = (self() > 0) & (self.expert_seen > 0)
        decay = 1 - 1 / self.window
        scale = (1 - decay ** self.expert_seen.float()).clamp(min=1e-6).unsqueeze(1)
        # No eps in the norm of a live row: outputs of a small network must not look orthogonal.
        similarity = gram(self.expert_mean.float() / scale, eps=1e-12)
        pair = live.unsqueeze(0) & live.unsqueeze(1)
        error = (similarity - torch.eye(self.num_experts, device=similarity.device)).square()
        error = (error * pair).sum() / pair.sum().clamp(min=1)
        spread = self.unexplained.float() / (1 - decay ** self.observed.float()).clamp(min=1e-6)
        return (1 - error) * spread * (self.observed > 0)

    @torch.no_grad()
    def observe(self, expert_mean: Tensor, served: Tensor, unexplained: Tensor) -> None:
        """Take in one optimiser step and move the state machine.

        Args:
            expert_mean: Mean output of each expert, ``[E, D]``.
            served: Rows each expert served, ``[E]``; experts with 0 keep their average.
            unexplained: Variance left unexplained, scalar.
        """
        step = 1 / self.window
        seen = (served > 0).unsqueeze(1)
        self.expert_mean.copy_(
            torch.where(seen, self.expert_mean.lerp(expert_mean.to(self.expert_mean), step), self.expert_mean)
        )
        self.expert_seen += served > 0
        self.unexplained.lerp_(unexplained.to(self.unexplained), step)
        self.observed += 1
        self.steps += self.phase == ACTIVATING
        self.phase[(self.phase == ACTIVATING) & (self.steps >= self.steps_to_active)] = ACTIVE
        self._wake_next()

    def _wake_next(self) -> None:
        """Wake the first dormant ghost of a saturated layer; arithmetic only, so no device sync."""
        rested = self.observed - self.last_wake >= self.window
        idle = ~(self.phase == ACTIVATING).any()
        dormant = self.phase == DORMANT
        first = dormant & (dormant.cumsum(0) == 1)
        wake = first & (rested & idle & (self.saturation() > self.threshold))
        self.phase += wake * ACTIVATING
        self.last_wake.copy_(torch.where(wake.any(), self.observed, self.last_wake))

    @torch.no_grad()
    def reset_ghost(self, ghost: int) -> None:
        """Send ghost ``ghost`` (``0 .. G - 1``) back to dormancy."""
        expert = self.num_experts - self.num_ghosts + ghost
        self.phase[ghost] = DORMANT
        self.steps[ghost] = 0
        self.expert_mean[expert] = 0
        self.expert_seen[expert] = 0

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_ghosts={self.num_ghosts}, threshold={self.threshold}, "
            f"rate={self.rate}, window={self.window}"
        )
