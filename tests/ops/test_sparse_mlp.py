"""Sparse expert MLPs: finite differences, with experts without rows and rows without an expert."""

import pytest
import torch

from graphmoe.errors import GraphError
from graphmoe.nn import SparseLinear
from graphmoe.ops import sparse_mlp as kernel
from graphmoe.ops.grouped_mlp import grouped_mlp


def layers(count, activation):
    halves = 2 if activation == "swiglu" else 1
    gate_up = [SparseLinear(4, halves * 5, 0.4, bias=False) for _ in range(count)]
    return gate_up, [SparseLinear(5, 4, 0.5, bias=False) for _ in range(count)]


def apply(rows, ptr, maps, weights, activation):
    count = len(maps[0])
    graphs = [layer.topology() for part in maps for layer in part]
    pairs = list(zip(graphs, weights, strict=True))
    return kernel.sparse_mlp(rows, ptr, pairs[:count], pairs[count:], activation=activation)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("offsets", [[0, 3, 3, 7], [0, 0, 0, 0], [0, 1, 5, 8]])
def test_gradients(activation, offsets, double, monkeypatch):
    monkeypatch.setattr(kernel, "PIECE_ROWS", 2)
    maps, ptr = layers(3, activation), torch.tensor(offsets)
    rows = torch.randn(8, 4, requires_grad=True)
    weights = [layer.weight for part in maps for layer in part]

    def call(rows, *weights):
        return apply(rows, ptr, maps, weights, activation)

    assert torch.autograd.gradcheck(call, (rows, *weights))
    out = call(rows, *weights)
    dense = [torch.stack([layer.dense_weight() for layer in part]) for part in maps]
    torch.testing.assert_close(out, grouped_mlp(rows, *dense, ptr, activation=activation))
    assert (out[offsets[-1] :] == 0).all()


@pytest.mark.parametrize("ptr", [[0, 3, 2, 4], [1, 2, 3, 4], [0, 1, 2, 9]])
def test_offsets_that_are_none(ptr):
    maps = layers(3, "swiglu")
    weights = [layer.weight for part in maps for layer in part]
    with pytest.raises(GraphError, match="ptr: offsets do not ascend"):
        apply(torch.randn(8, 4), torch.tensor(ptr), maps, weights, "swiglu")
