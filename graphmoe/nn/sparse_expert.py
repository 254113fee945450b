from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from graphmoe.errors import ConfigError
from graphmoe.nn.bare import is_bare
from graphmoe.nn.expert import ACTIVATIONS, ExpertConv
from graphmoe.nn.sparse import SparseLinear, allocate_density
from graphmoe.ops.expert_loop import HALVES, read_offsets
from graphmoe.ops.sparse_mlp import sparse_mlp


class SparseExpert(MessagePassing):
    r"""Experts whose weights are edges: :class:`ExpertConv` with sparse matrices that may evolve
    (`SET <https://arxiv.org/abs/1707.04780>`_).

    For row :math:`r` with token :math:`n` and expert :math:`e`, whose matrices are three sets of edges,

    .. math::
        o_r = W^{down}_e\,\bigl(\mathrm{SiLU}(W^{gate}_e x_n) \odot W^{up}_e x_n\bigr)

    (``swiglu``), or :math:`W^{down}_e\,\mathrm{GELU}(W^{up}_e x_n)` (``gelu``).

    Edges: token -> row, and inside an expert neuron -> neuron. Rows sorted by expert (``ptr``) are served
    expert by expert, a sparse product for each of its maps; without ``ptr``, or with ``fuse = False``,
    messages are formed one by one, inside the experts too, if their own convolutions have
    ``fuse = False``. An expert without rows has a gradient of 0, as one whose matrices are stacked.

    Args:
        in_channels: Channels ``D`` of a token and of a row.
        hidden_channels: Channels ``F`` inside an expert.
        num_experts: ``E``.
        density: Edges of an expert, as a share of the places of its matrices, in (0, 1].
        distribution: How its maps share them: see :func:`~graphmoe.nn.sparse.allocate_density`.
        activation: ``swiglu`` or ``gelu``.
        generator: Draws the edges, on the CPU; default: torch's own.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Attributes:
        gate_up_proj, down_proj: A :class:`SparseLinear` an expert; gate and up are one map.

    Shapes:
        - **input:** as :class:`ExpertConv`.
        - **output:** ``[R, D]``; 0 for an absent row.

    Raises:
        ConfigError: A density outside (0, 1], an unknown distribution or activation.
        GraphError: ``edge_index`` that does not lead from these tokens to these rows.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_experts: int,
        *,
        density: float,
        distribution: str = "uniform",
        activation: str = "swiglu",
        generator: torch.Generator | None = None,
        **kwargs,
    ):
        super().__init__(aggr="sum", **kwargs)
        if activation not in ACTIVATIONS:
            expected = f"one of {', '.join(ACTIVATIONS)}"
            raise ConfigError("unknown activation", "activation", expected, activation)
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.num_experts, self.activation = num_experts, activation
        self.fuse = True
        shapes = [(in_channels, HALVES[activation] * hidden_channels), (hidden_channels, in_channels)]
        self.gate_up_proj, self.down_proj = (
            nn.ModuleList(
                SparseLinear(*shape, share, bias=False, generator=generator) for _ in range(num_experts)
            )
            for shape, share in zip(shapes, allocate_density(shapes, density, distribution), strict=True)
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in (*self.gate_up_proj, *self.down_proj):
            layer.reset_parameters()

    @property
    def num_edges(self) -> int:
        """Weights of all experts together."""
        return sum(weight.numel() for weight in self.parameters())

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Adj,
        expert: Tensor | tuple[object, Tensor],
        ptr: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> Tensor:
        if ptr is not None and self.fuse:
            return self._sorted_rows(x, edge_index[0], ptr)
        x, expert, edges, size = ExpertConv.ends(x, edge_index, expert)
        return self.propagate(edges, x=(x, None), expert=(None, expert.unsqueeze(-1)), size=size)

    # How many rows an expert has is known on the host only; its products are opaque to a compiler anyway.
    @torch.compiler.disable
    def _sorted_rows(self, x: Tensor, token: Tensor, ptr: Tensor) -> Tensor:
        rows = x.index_select(0, token)  # [R, D]
        # Who listens to single maps, as for growth by gradients, has them called.
        if all(is_bare(layer, SparseLinear) for layer in (*self.gate_up_proj, *self.down_proj)):
            gate_up, down = (
                [(layer.topology(), layer.weight) for layer in layers]
                for layers in (self.gate_up_proj, self.down_proj)
            )
            return sparse_mlp(rows, ptr, gate_up, down, activation=self.activation)
        offsets = read_offsets(ptr, rows.size(0))
        parts = [self._apply_one(e, rows[low:high]) for e, (low, high) in enumerate(pairwise(offsets))]
        return torch.cat([*parts, torch.zeros_like(rows[offsets[-1] :])]).to(x.dtype)

    def _apply_one(self, index: int, rows: Tensor) -> Tensor:
        """Expert ``index`` on ``rows [r, D]``."""
        hidden = self.gate_up_proj[index](rows.t(), feature_major=True)  # [F or 2F, r]
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden)
        return self.down_proj[index](hidden, feature_major=True).t()

    def message(self, x_j: Tensor, expert_i: Tensor) -> Tensor:
        out = torch.zeros_like(x_j)
        for index in range(self.num_experts):
            row = (expert_i.squeeze(-1) == index).nonzero().flatten()
            out = out.index_add(0, row, self._apply_one(index, x_j.index_select(0, row)).to(out.dtype))
        return out

    def __repr__(self) -> str:
        places = self.num_experts * (HALVES[self.activation] + 1) * self.in_channels * self.hidden_channels
        return (
            f"{type(self).__name__}({self.in_channels}, hidden_channels={self.hidden_channels}, "
            f"num_experts={self.num_experts}, activation={self.activation!r}, edges={self.num_edges}, "
            f"density={self.num_edges / places:.4g})"
        )
