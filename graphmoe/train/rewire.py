"""Evolving the edges of sparse layers while they train, and all that belongs to an edge with it."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphmoe.checkpoint.shards import is_shard
from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.nn import SparseLinear
from graphmoe.nn.sparse import GROWTH
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.ranks import sum_of_ranks


def sparse_layers(model: nn.Module) -> list[SparseLinear]:
    """The sparse layers of any model, in its order."""
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@torch.no_grad()
def move_moments(optimizer: Optimizer, parameter: nn.Parameter, origin: Tensor) -> None:
    """Let the state that an optimiser has of edges move with them, and begin at 0 for new ones.

    Args:
        optimizer: Any; state of the shape of the parameter is that of its edges.
        parameter: Weights of edges, ``[M]``.
        origin: Where each edge stood before, ``[M]``, -1 for a new one, as
            :meth:`~graphmoe.nn.SparseLinear.rewire` returns it.
    """
    old, new = origin.clamp(min=0), origin < 0
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.copy_(value.index_select(0, old).masked_fill(new, 0))


class Rewire(Callback):
    """Rewires every :class:`~graphmoe.nn.SparseLinear` of a model every few optimiser steps, but not after
    the last one (`SET <https://arxiv.org/abs/1707.04780>`_, `RigL <https://arxiv.org/abs/1911.11134>`_).

    Which edges grow depends on ``(seed, step, layer)`` only, or on gradients of the global batch: all
    processes change alike, and so does a resumed run.

    Args:
        model: Its sparse layers are the ones.
        every: Optimiser steps between rewirings, such as those of an epoch.
        fraction: Of the edges, that is dropped, in [0, 1].
        growth: ``random`` (SET) or ``gradient`` (RigL): by the gradient of the step just done.
        until: Last optimiser step that may be followed by a rewiring. Default: the last but one.
        seed: Seed of random growth.

    Raises:
        ConfigError: No interval, a fraction that is none, unknown growth, or sharded parameters.
        GraphMoEError: The number of edges has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        fraction: float = 0.3,
        growth: str = "random",
        until: int | None = None,
        seed: int = 0,
    ):
        if every < 1:
            raise ConfigError("no interval", "every", "at least 1 step", every)
        if not 0 <= fraction <= 1:
            raise ConfigError("no share of the edges", "fraction", "from 0 to 1", fraction)
        if growth not in GROWTH:
            raise ConfigError("unknown growth", "growth", f"one of {', '.join(GROWTH)}", growth)
        self.layers = sparse_layers(model)
        self.every, self.fraction, self.growth, self.until, self.seed = every, fraction, growth, until, seed
        self.gradients: list[Tensor] | None = None
        self._hooks: list = []

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if any(is_shard(layer.weight) for layer in self.layers):
            raise ConfigError("edges of sharded layers cannot move", "--parallel", "ddp", "fsdp")
        if self.growth == "gradient":
            self._hooks = [
                layer.register_forward_hook(self._listener(index), with_kwargs=True)
                for index, layer in enumerate(self.layers)
            ]
            self._listen(state)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if self._due(state, state.step):
            self.rewire(state)
        self._listen(state)

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()

    def rewire(self, state: TrainState) -> None:
        """Rewire all layers now, as after ``state.step``."""
        gradients: list[Tensor | None] = [None] * len(self.layers)
        if self.gradients is not None:
            named = {str(index): gradient for index, gradient in enumerate(self.gradients)}
            gradients = list(sum_of_ranks(state.accelerator, named).values())
        for index, (layer, gradient) in enumerate(zip(self.layers, gradients, strict=True)):
            numbers = np.random.SeedSequence([self.seed, state.step, index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(numbers[0]) % 2**63)
            count = layer.num_edges
            origin = layer.rewire(self.fraction, self.growth, gradient=gradient, generator=generator)
            if not origin.numel() == layer.source.numel() == count:
                raise GraphMoEError("rewiring changed the number of edges", f"layer {index}", count,
                                    layer.source.numel())  # fmt: skip
            move_moments(state.optimizer, layer.weight, origin)

    def figures(self, state: TrainState, model: nn.Module) -> dict[str, Tensor]:
        """Edges of each layer and the share of its first ones that are left, for
        :class:`~graphmoe.train.logs.RecordLog`."""
        edges = torch.tensor([layer.num_edges for layer in self.layers])
        survival = torch.tensor([layer.survival() for layer in self.layers])
        return {"sparse_edges": edges, "sparse_survival": survival} if self.layers else {}

    def _due(self, state: TrainState, step: int) -> bool:
        last = state.max_steps - 1 if self.until is None else min(self.until, state.max_steps - 1)
        return step > 0 and step % self.every == 0 and step <= last

    def _listen(self, state: TrainState) -> None:
        """Collect gradients of all places in the next step, if it is followed by a rewiring."""
        self.gradients = None
        if self.growth == "gradient" and self._due(state, state.step + 1):
            self.gradients = [layer.weight.new_zeros(layer.out_channels, layer.in_channels)
                              for layer in self.layers]  # fmt: skip

    def _listener(self, index: int):
        def after_forward(layer: SparseLinear, args: tuple, kwargs: dict, out: Tensor) -> None:
            if self.gradients is None or not out.requires_grad:
                return
            total, x = self.gradients[index], args[0].detach()
            major = kwargs.get("feature_major", False)

            def add(grad: Tensor) -> None:
                grad, heard = (t if major else t.reshape(-1, t.size(-1)).t() for t in (grad, x))
                total.addmm_(grad.to(total.dtype), heard.t().to(total.dtype))

            out.register_hook(add)

        return after_forward
