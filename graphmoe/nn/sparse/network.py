"""Layers of edges as one typed graph."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch_geometric.data import HeteroData

from graphmoe.errors import GraphError
from graphmoe.graph import to_hetero
from graphmoe.typing import FEEDS, NEURON

if TYPE_CHECKING:
    from graphmoe.nn.sparse.sparse_linear import SparseLinear


def feeds(layers: Sequence["SparseLinear"]) -> HeteroData:
    """Chained sparse layers as neurons that feed neurons.

    Args:
        layers: Each takes what the one before it gives.

    Returns:
        Nodes ``neuron`` with ``layer [N]`` (0: the input) and ``bias [N]``, edges ``feeds`` with
        ``weight [M]``.

    Raises:
        GraphError: No layer, or one that does not fit the one before it.
    """
    if not layers:
        raise GraphError("no layer", "layers", "at least one")
    counts = [layers[0].in_channels]
    for index, layer in enumerate(layers):
        if layer.in_channels != counts[-1]:
            raise GraphError("does not take what the layer before gives", f"layers[{index}]", counts[-1],
                             layer.in_channels)  # fmt: skip
        counts.append(layer.out_channels)
    first = [sum(counts[:index]) for index in range(len(counts))]
    device = layers[0].weight.device
    edges = [
        layer.edge_index() + torch.tensor([[first[i]], [first[i + 1]]], device=device)
        for i, layer in enumerate(layers)
    ]
    numbers = torch.arange(len(counts), device=device)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = [weight.new_zeros(counts[0])] + [
        weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    nodes = {"layer": numbers.repeat_interleave(torch.tensor(counts, device=device)), "bias": torch.cat(bias)}
    return to_hetero(
        {NEURON: sum(counts)},
        {FEEDS: torch.cat(edges, dim=1)},
        {FEEDS: {"weight": weight}},
        {NEURON: nodes},
    )
