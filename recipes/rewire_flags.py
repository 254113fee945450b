"""Flags of weights that are edges which evolve, what moves them, and what is recorded of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graphmoe.nn import SparseLinear, moe_layers
from graphmoe.train.config import flag
from graphmoe.train.loop import TrainState
from graphmoe.train.rewire import Rewire, sparse_layers

GROWTH = {"set": "random", "rigl": "gradient"}
"""How edges grow, by the topologies in which any do."""


@dataclass(kw_only=True)
class RewireFlags:
    """What every recipe with sparse weights has, to be put before its other flags: ``class
    MyConfig(RewireFlags, RunConfig)``.

    Raises:
        ConfigError: A share outside [0, 1], or no interval.
    """

    topology: Literal["set", "static", "rigl", "dense"] = flag(
        "set", "set (random growth), rigl (growth by gradients), static (no growth), or dense"
    )
    zeta: float = flag(0.3, "share of the edges that a rewiring replaces", aliases=["--rewire_fraction"])
    rewire_every: int | None = flag(None, "optimiser steps between rewirings; an epoch without it")
    rewire_until: float = flag(0.75, "share of the steps after which no edge moves any more")

    def __post_init__(self):
        super().__post_init__()
        for name in ("zeta", "rewire_until"):
            self.require(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        self.require("rewire_every", self.rewire_every is None or self.rewire_every >= 1, "a number >= 1")

    def rewiring(self, model: nn.Module) -> Rewire | None:
        """What moves the edges of a model, if these flags say that they move; the number of steps and the
        interval are known by then."""
        if self.topology not in GROWTH:
            return None
        return Rewire(
            model,
            every=self.rewire_every,
            fraction=self.zeta,
            growth=GROWTH[self.topology],
            until=math.floor(self.rewire_until * self.max_steps),
            seed=self.seed,
        )


def edge_records(layers: Sequence[SparseLinear]) -> dict[str, Tensor]:
    """The edges of trained layers, for pictures: ``final_feeds [3, M]`` (layer, source, target), weight and
    age of each, ``[M]``, and ``final_feeds_size [L, 2]``; nothing without layers."""
    if not layers:
        return {}
    edges = [
        torch.stack([torch.full_like(layer.source, i), layer.source, layer.target])
        for i, layer in enumerate(layers)
    ]
    return {
        "final_feeds": torch.cat(edges, dim=1),
        "final_feeds_weight": torch.cat([layer.weight.detach() for layer in layers]),
        "final_feeds_age": torch.cat([layer.age() for layer in layers]),
        "final_feeds_size": torch.tensor([[layer.in_channels, layer.out_channels] for layer in layers]),
    }


def block_figures(state: TrainState, model: nn.Module) -> dict[str, Tensor]:
    """Edges of the experts of each block of a language model, their density and the share of the first ones
    that are left, for :class:`~graphmoe.train.logs.RecordLog`; nothing if experts have matrices."""
    blocks = [sparse_layers(layer) for layer in moe_layers(model)]
    if not any(blocks):
        return {}
    edges = torch.tensor([[layer.num_edges for layer in block] for block in blocks])  # [L, maps]
    places = torch.tensor([[layer.num_places for layer in block] for block in blocks])
    left = torch.tensor([[layer.survival() for layer in block] for block in blocks])
    total = edges.sum(1)
    return {
        "sparse_edges": total,
        "sparse_density": total / places.sum(1),
        "sparse_survival": (edges * left).sum(1) / total,
    }
