import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.nn.fuse.sum_fusion import SumFusion, ends
from graphmoe.nn.lazy import lazy_channels


@lazy_channels
class GatedFusion(nn.Module):
    r"""Returns rows and their mediator to a token through a gate and a projection:

    .. math::
        \gamma_n = \sigma(w^\top x_n + b), \qquad
        y_n = W_o\Bigl(\gamma_n\, m_n + (1 - \gamma_n) \sum_{r \in n} w_r\, o_r\Bigr)

    with :math:`x_n` the token as it entered the layer and :math:`m_n` the mediator of its rows; without a
    mediator :math:`\gamma = 0`. The sum is :class:`SumFusion`. A token without rows gets 0.

    Edges: row -> token, mediator -> token.

    Args:
        channels: Channels ``D`` of a row and of a token; ``-1``: those of the first input.
        mediator: Whether there is one.

    Shapes:
        - **input:** as :class:`SumFusion`; with a mediator also ``token [N, D]`` and ``mediator [N, D]``.
        - **output:** ``[N, D]``; with ``return_gate=True`` also the gate ``[N]``, or ``None`` without a
        mediator.

    Raises:
        ConfigError: A mediator that is missing or not expected.
    """

    def __init__(self, channels: int, *, mediator: bool = False):
        super().__init__()
        self.sum = SumFusion()
        self.gate = nn.Linear(channels, 1) if mediator else None
        self.lin = nn.Linear(channels, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        num_tokens: int | None = None,
        *,
        token: Tensor | None = None,
        mediator: Tensor | None = None,
        return_gate: bool = False,
    ):
        x, edge_index, edge_weight, num_tokens = ends(x, edge_index, edge_weight, num_tokens)
        out, gate = self.sum(x, edge_index, edge_weight, num_tokens), None
        if (mediator is None) != (self.gate is None):
            expected = "none" if self.gate is None else "[N, D]"
            got = "none" if mediator is None else tuple(mediator.shape)
            raise ConfigError("mediator does not fit the fusion", "mediator", expected, got)
        if mediator is not None:
            gate = self.gate(token).sigmoid()  # [N, 1]
            if edge_index is None:
                served = edge_weight.detach().sum(dim=1)
            else:
                served = edge_weight.new_zeros(out.size(0)).index_add(0, edge_index[1], edge_weight.detach())
            # A masked token has no rows, but a mediator all the same.
            out = torch.where((served > 0).unsqueeze(1), out + gate * (mediator - out), 0.0)
            gate = gate.squeeze(1)
        out = self.lin(out)
        return (out, gate) if return_gate else out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lin.in_features}, mediator={self.gate is not None})"
