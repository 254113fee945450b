"""The order in which slots were written: the edges ``slot precedes slot``."""

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing


def link(link: Tensor, write_weights: Tensor, precedence: Tensor) -> Tensor:
    r"""Links after a write, ``[B, S, S]``: how far slot ``i`` was written right after slot ``j``.

    .. math::
        L_{ij}' = (1 - w_i - w_j) L_{ij} + w_i p_j, \qquad L_{ii}' = 0

    Args:
        link: ``[B, S, S]`` (later, earlier).
        write_weights: ``w [B, S]`` of this step.
        precedence: ``p [B, S]`` of the step before.
    """
    later, earlier = write_weights.unsqueeze(2), write_weights.unsqueeze(1)
    new = (1 - later - earlier) * link + later * precedence.unsqueeze(1)
    return new * (1 - torch.eye(new.size(1), dtype=new.dtype, device=new.device))


def precedence(precedence: Tensor, write_weights: Tensor) -> Tensor:
    r"""How far each slot was the last one written, :math:`(1 - \sum_i w_i) p + w`, ``[B, S]``."""
    return (1 - write_weights.sum(dim=-1, keepdim=True)) * precedence + write_weights


def forward_weights(link: Tensor, read_weights: Tensor) -> Tensor:
    """What was written right after what was read, ``L w``, ``[B, R, S]``."""
    return read_weights @ link.mT


def backward_weights(link: Tensor, read_weights: Tensor) -> Tensor:
    """What was written right before what was read, ``L^T w``, ``[B, R, S]``."""
    return read_weights @ link


class LinkConv(MessagePassing):
    r"""Slots tell others where the heads were, along the order in which they were written.

    .. math::
        L_{ij}' = (1 - w_i - w_j) L_{ij} + w_i p_j, \qquad f_i = \sum_j L_{ij}' r_j

    Edges: earlier slot ``j`` -> later slot ``i`` (``slot precedes slot``), none from a slot to itself. The
    other way round they carry what was written before: :meth:`forward` with flipped edges.

    Args:
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** read weights ``[S, R]`` of the slots, ``edge_index [2, M]``, links ``[M]``.
        - **output:** ``[S, R]``.
    """

    def __init__(self, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)

    def relink(self, link: Tensor, edge_index: Tensor, write_weights: Tensor, precedence: Tensor) -> Tensor:
        """Links after a write, ``[M]``, of slots with ``write_weights [S]`` and ``precedence [S]``."""
        return self.edge_updater(edge_index, link=link, write=write_weights, last=precedence)

    def edge_update(self, link: Tensor, write_i: Tensor, write_j: Tensor, last_j: Tensor) -> Tensor:
        return (1 - write_i - write_j) * link + write_i * last_j

    def forward(self, read_weights: Tensor, edge_index: Tensor, link: Tensor) -> Tensor:
        return self.propagate(edge_index, x=read_weights, link=link)

    def message(self, x_j: Tensor, link: Tensor) -> Tensor:
        return x_j * link.unsqueeze(-1)
