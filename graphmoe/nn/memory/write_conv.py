import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from graphmoe.errors import GraphError
from graphmoe.graph import to_edges
from graphmoe.ops.chain_scan import chain_scan, ranks


class WriteConv(MessagePassing):
    r"""Gated writing into slots, with erasure channel by channel as in a
    `neural Turing machine <https://arxiv.org/abs/1410.5401>`_.

    .. math::
        V_s \leftarrow \Bigl(1 - \frac1{z_s}\sum_{n \to s} w_{ns} g_n e_n\Bigr) \odot V_s
        + \frac1{z_s}\sum_{n \to s} w_{ns} g_n u_n, \qquad
        z_s = \max\Bigl(1, \sum_{n \to s} w_{ns} g_n\Bigr)

    with :math:`e_n = \sigma(W_e x_n + b_e)` and :math:`u_n = W_u x_n`. Tokens that together would write more
    than a slot has room for share it: :math:`z` keeps the factor of the old contents in [0, 1].

    With ``time`` the edges of a slot act one after another, each by this formula as if it were alone: what
    comes first is partly erased by what comes later. All slots go on side by side, in as many passes as the
    busiest has edges: see :func:`~graphmoe.ops.chain_scan.chain_scan`.

    Edges: token -> slot.

    Args:
        in_channels: Channels ``D`` of a token.
        slot_channels: Channels ``F`` of a slot.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x``: pair ``(x_token [N, D], x_slot [slots, F])``; ``edge_index [2, M]``;
          ``edge_weight [M]``; ``gate [N]``, both from 0 on; ``time [M]``; ``key [N, F]``: what the update of
          each token is multiplied with.
        - **output:** the slots afterwards, ``[slots, F]``; with ``return_before=True``, which wants ``time``,
          also the slot of each edge just before it acted, ``[M, F]``.

    Raises:
        GraphError: Features that are no pair, an ``edge_index`` that is no graph of them, or
            ``return_before`` without ``time``.
    """

    def __init__(self, in_channels: int, slot_channels: int, **kwargs):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        self.in_channels, self.slot_channels = in_channels, slot_channels
        self.fuse = True
        self.lin_update = nn.Linear(in_channels, slot_channels, bias=False)
        self.lin_erase = nn.Linear(in_channels, slot_channels)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_update.reset_parameters()
        self.lin_erase.reset_parameters()

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        edge_index: Adj,
        edge_weight: Tensor | None = None,
        gate: Tensor | None = None,
        time: Tensor | None = None,
        *,
        key: Tensor | None = None,
        return_before: bool = False,
    ):
        if not isinstance(x, tuple | list) or len(x) != 2:
            raise GraphError("tokens write slots", "x", "a pair (x_token, x_slot)", type(x).__name__)
        if return_before and time is None:
            raise GraphError("edges that act at once have no before", "time", "[M] with return_before", None)
        token, slot = x
        edges = to_edges(edge_index, (token.size(0), slot.size(0)))
        strength = self._strength(edges, edge_weight, gate, slot)  # [M]
        erase, update = self.terms(token, key)
        erase, update = erase.to(slot.dtype), update.to(slot.dtype)
        if time is None:
            return self._at_once(edges, strength, erase, update, slot)
        if self.fuse:
            share = (strength / strength.clamp(min=1)).unsqueeze(1)
            decay = 1 - share * erase.index_select(0, edges[0])
            before, last = chain_scan(decay, share * update.index_select(0, edges[0]), slot, edges[1], time)
        else:
            before, last = self._one_by_one(edges, strength, erase, update, slot, time)
        return (last, before) if return_before else last

    def terms(self, token: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each token ``[N, D]`` erases, in [0, 1], and what it writes, each ``[N, F]``."""
        update = self.lin_update(token)
        return self.lin_erase(token).sigmoid(), update if key is None else update * key

    @staticmethod
    def _strength(edges: Tensor, weight: Tensor | None, gate: Tensor | None, slot: Tensor) -> Tensor:
        strength = slot.new_ones(edges.size(1)) if weight is None else weight.to(slot.dtype)
        return strength if gate is None else strength * gate.index_select(0, edges[0]).to(slot.dtype)

    def _at_once(
        self, edges: Tensor, strength: Tensor, erase: Tensor, update: Tensor, slot: Tensor
    ) -> Tensor:
        size = (erase.size(0), slot.size(0))
        terms = torch.cat([erase, update, torch.ones_like(erase[:, :1])], dim=1)
        erase, update, total = self.propagate(edges, terms=(terms, None), strength=strength, size=size).split(
            [slot.size(1), slot.size(1), 1], dim=1
        )
        room = total.clamp(min=1)
        return (1 - erase / room) * slot + update / room

    def _one_by_one(
        self, edges: Tensor, strength: Tensor, erase: Tensor, update: Tensor, slot: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        order = time.sort(stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = ranks(edges[1].index_select(0, order), slot.size(0))
        before = slot.new_zeros(edges.size(1), slot.size(1))
        for turn in range(int(rank.max()) + 1 if rank.numel() else 0):
            now = (rank == turn).nonzero().squeeze(1)
            before = before.index_add(0, now, slot.index_select(0, edges[1, now]))
            slot = self._at_once(edges[:, now], strength[now], erase, update, slot)
        return before, slot

    def message(self, terms_j: Tensor, strength: Tensor) -> Tensor:
        return strength.unsqueeze(1) * terms_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.slot_channels})"
