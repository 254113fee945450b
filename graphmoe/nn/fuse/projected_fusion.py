from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.nn.fuse.sum_fusion import SumFusion, ends
from graphmoe.nn.lazy import lazy_channels


@lazy_channels
class ProjectedFusion(nn.Module):
    r"""Returns the rows of a token to it through a projection:

    .. math::
        y_n = \mathrm{LayerNorm}\Bigl(\mathrm{GELU}\bigl(W \sum_{r \in n} w_r\, o_r + b\bigr)\Bigr)

    The sum is :class:`SumFusion`; with equal weights it is the mean that the first coupled
    mixtures took. A token without rows gets 0.

    Edges: row -> token.

    Args:
        channels: Channels ``D`` of a row and of a token; ``-1``: those of the first input.
        eps: Added to the variance in LayerNorm.

    Shapes:
        - **input:** as :class:`SumFusion`.
        - **output:** ``[N, D]``.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__()
        self.sum = SumFusion()
        self.lin = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels, eps=eps)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        self.norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        x, edge_index, edge_weight, num_tokens = ends(x, edge_index, edge_weight, num_tokens)
        total = self.sum(x, edge_index, edge_weight, num_tokens)
        out = self.norm(F.gelu(self.lin(total)))
        if edge_index is not None:
            served = total.new_zeros(total.size(0)).index_add(0, edge_index[1], edge_weight.detach())
        else:
            served = edge_weight.detach().sum(dim=1)
        # The biases would give a masked token, which no row serves, an output of its own.
        return out * (served > 0).unsqueeze(-1)
