"""Content weights, write weights and read weights of a differentiable neural computer."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

from graphmoe.ops.dnc_content import NORM_EPS


def safe_norm(x: Tensor) -> Tensor:
    r""":math:`\sqrt{\sum x^2 + 10^{-6}}` over the last dimension: it has a gradient at 0, where a memory
    starts."""
    return (x.square().sum(dim=-1) + NORM_EPS).sqrt()


def content_weights(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    r"""Where a key finds its like, from `"Hybrid computing using a neural network with dynamic external
    memory" <https://www.nature.com/articles/nature20101>`_ (2016), as all equations of this package.

    .. math::
        C(M, k, \beta)_i = \mathrm{softmax}_i\bigl(\beta \cos(k, M_i)\bigr)

    Args:
        memory: ``[B, S, W]``.
        keys: ``[B, R, W]``.
        strengths: ``[B, R]``, at least 1.

    Returns:
        ``[B, R, S]``, of which each row sums to 1.
    """
    cosine = keys @ memory.mT / (safe_norm(keys).unsqueeze(-1) * safe_norm(memory).unsqueeze(1))
    return torch.softmax(strengths.unsqueeze(-1) * cosine, dim=-1)


def write_weighting(
    allocation: Tensor, content: Tensor, allocation_gate: Tensor, write_gate: Tensor
) -> Tensor:
    r"""Where to write: :math:`g_w (g_a a + (1 - g_a) c_w)`, ``[B, S]``.

    Args:
        allocation: ``a [B, S]``.
        content: ``c_w [B, S]``.
        allocation_gate: ``g_a [B, 1]``.
        write_gate: ``g_w [B, 1]``.
    """
    return write_gate * (allocation_gate * allocation + (1 - allocation_gate) * content)


def erase_and_write(memory: Tensor, write_weights: Tensor, erase: Tensor, vector: Tensor) -> Tensor:
    r"""The memory after a write, :math:`M \circ (1 - w e^\top) + w v^\top`, ``[B, S, W]``.

    Args:
        memory: ``[B, S, W]``.
        write_weights: ``w [B, S]``.
        erase: ``e [B, W]``.
        vector: ``v [B, W]``.
    """
    column = write_weights.unsqueeze(-1)
    return memory * (1 - column * erase.unsqueeze(1)) + column * vector.unsqueeze(1)


def read_weighting(before: Tensor, content: Tensor, after: Tensor, modes: Tensor) -> Tensor:
    r"""Where to read: :math:`\pi_1 b + \pi_2 c + \pi_3 f`, ``[B, R, S]``.

    Args:
        before, content, after: ``b``, ``c`` and ``f``, ``[B, R, S]``.
        modes: ``[B, R, 3]``, of which each row sums to 1.
    """
    first, second, third = modes.unsqueeze(-1).unbind(dim=2)
    return first * before + second * content + third * after


class ContentConv(MessagePassing):
    r"""Read heads hear the slots that are like their keys: attention by cosine.

    .. math::
        w_{ri} = \mathrm{softmax}_i\bigl(\beta_r \cos(k_r, M_i)\bigr), \qquad y_r = \sum_i w_{ri} M_i

    Edges: slot -> head (``slot answers controller``). A head without edges hears 0.

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** slots ``[S, W]``, keys ``[R, W]``, strengths ``[R]``, ``edge_index [2, M]``.
        - **output:** what is heard ``[R, W]``, and the weights ``[M]``.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)

    def forward(
        self, memory: Tensor, keys: Tensor, strengths: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = (memory.size(0), keys.size(0))
        weights = self.edge_updater(
            edge_index,
            x=(memory, keys),
            norm=(safe_norm(memory), safe_norm(keys)),
            strength=(None, strengths),
            size=size,
        )
        return self.propagate(edge_index, memory=(memory, None), weights=weights, size=size), weights

    def edge_update(self, x_j, x_i, norm_j, norm_i, strength_i, index, ptr, size_i) -> Tensor:
        cosine = (x_j * x_i).sum(dim=-1) / (norm_j * norm_i)
        return softmax(strength_i * cosine, index, ptr, size_i)

    def message(self, memory_j: Tensor, weights: Tensor) -> Tensor:
        return memory_j * weights.unsqueeze(-1)


class SlotWriteConv(MessagePassing):
    r"""Controllers erase and write slots.

    .. math::
        M_i' = M_i + \sum_c w_{ci} (v_c - e_c \circ M_i)

    Edges: controller -> slot (``controller writes slot``).

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** slots ``[S, W]``, erase and write vectors ``[C, W]``, ``edge_index [2, M]``, its write
          weights ``[M]``.
        - **output:** ``[S, W]``.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)

    def forward(
        self, memory: Tensor, erase: Tensor, vector: Tensor, edge_index: Tensor, weights: Tensor
    ) -> Tensor:
        size = (erase.size(0), memory.size(0))
        return memory + self.propagate(
            edge_index,
            memory=(None, memory),
            erase=(erase, None),
            vector=(vector, None),
            weights=weights,
            size=size,
        )

    def message(self, memory_i: Tensor, erase_j: Tensor, vector_j: Tensor, weights: Tensor) -> Tensor:
        return weights.unsqueeze(-1) * (vector_j - erase_j * memory_i)


def strength(raw: Tensor) -> Tensor:
    """``1 + softplus``, at least 1."""
    return 1 + F.softplus(raw)
