import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from graphmoe.errors import ConfigError
from graphmoe.graph import to_edges
from graphmoe.nn.lazy import lazy_channels
from graphmoe.ops import grouped_mlp

ACTIVATIONS = ("swiglu", "gelu")


@lazy_channels
class ExpertConv(MessagePassing):
    r"""Applies to every row the expert it carries.

    A row is one expert serving one token: an edge of ``routes`` seen as a node. For row :math:`r`
    with token :math:`n` and expert :math:`e`

    .. math::
        o_r = W^{down}_e\,\bigl(\mathrm{SiLU}(W^{gate}_e x_n) \odot W^{up}_e x_n\bigr)

    (``swiglu``, `GLU variants <https://arxiv.org/abs/2002.05202>`_), or
    :math:`W^{down}_e\,\mathrm{GELU}(W^{up}_e x_n)` (``gelu``).

    Edges: token -> row. With ``ptr`` (rows sorted by expert, row ``r`` fed by edge ``r``) the
    grouped kernel serves them; without it, or with ``fuse = False``, the messages are formed one
    by one on any ``edge_index``.

    Args:
        in_channels: Channels ``D`` of a token and of a row; ``-1``: those of the first input.
        hidden_channels: Channels ``F`` inside an expert.
        num_experts: ``E``.
        activation: ``swiglu`` or ``gelu``.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [N, D]``, ``edge_index [2, R]`` (token, row) or ``adj_t``, ``expert [R]`` int64
          (``E`` for an absent row, whose output is 0); instead of ``x`` and of ``expert`` also pairs for
          tokens and rows, of which ``x[0]`` and ``expert[1]`` count; ``ptr [E + 1]``, ``perm [R]``
          (place of each row in token order; saves a sort).
        - **output:** ``[R, D]``.

    Raises:
        ConfigError: Unknown activation.
        GraphError: ``edge_index`` that does not lead from these tokens to these rows.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        **kwargs,
    ):
        super().__init__(aggr="sum", **kwargs)
        if activation not in ACTIVATIONS:
            raise ConfigError(
                "unknown activation", "activation", f"one of {', '.join(ACTIVATIONS)}", activation
            )
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.num_experts, self.activation = num_experts, activation
        self.fuse = True
        # The names and the layout of transformers' experts, so that weights can be exchanged.
        width = 2 * hidden_channels if activation == "swiglu" else hidden_channels
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, in_channels))
        self.down_proj = nn.Parameter(torch.empty(num_experts, in_channels, hidden_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.size(-1) ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Adj,
        expert: Tensor | tuple[object, Tensor],
        ptr: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> Tensor:
        if ptr is not None and self.fuse:
            return grouped_mlp(
                x, self.gate_up_proj, self.down_proj, ptr,
                token=edge_index[0], perm=perm, activation=self.activation,
            )  # fmt: skip
        x, expert, edges, size = self.ends(x, edge_index, expert)
        return self.propagate(edges, x=(x, None), expert=(None, expert.unsqueeze(-1)), size=size)

    @staticmethod
    def ends(
        x: Tensor | tuple[Tensor, Tensor | None], edge_index: Adj, expert: Tensor | tuple[object, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Tokens, experts of the rows, checked edges between them, and the numbers of both."""
        x = x if isinstance(x, Tensor) else x[0]
        expert = expert if isinstance(expert, Tensor) else expert[1]
        size = (x.size(0), expert.numel())
        return x, expert, to_edges(edge_index, size), size

    def reduce(self, x: Tensor, token: Tensor, weight: Tensor, ptr: Tensor, perm: Tensor) -> Tensor:
        """Weighted sum of the rows of each token, ``[N, D]``, without forming the rows.

        Args:
            x: ``[N, D]``.
            token: Token of each row, ``[R]``; rows are sorted by expert.
            weight: Weight of each row, ``[R]``.
            ptr: ``[E + 1]``.
            perm: Place ``n * k + slot`` of each row, ``[R]``.
        """
        return grouped_mlp(
            x, self.gate_up_proj, self.down_proj, ptr,
            token=token, weight=weight, perm=perm, reduce=True, activation=self.activation,
        )  # fmt: skip

    def message(self, x_j: Tensor, expert_i: Tensor) -> Tensor:
        out = x_j.new_zeros(x_j.size(0), self.in_channels)
        for index, (first, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            row = (expert_i.squeeze(-1) == index).nonzero().flatten()
            hidden = F.linear(x_j.index_select(0, row), first)
            if self.activation == "swiglu":
                gate, up = hidden.chunk(2, dim=-1)
                hidden = F.silu(gate) * up
            else:
                hidden = F.gelu(hidden)
            out = out.index_add(0, row, F.linear(hidden, down))
        return out

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, hidden_channels={self.hidden_channels}, "
            f"num_experts={self.num_experts}, activation={self.activation!r})"
        )
