import torch
from torch import Tensor, nn

from graphmoe.nn.route.router import Router
from graphmoe.nn.row_attention import RowAttention
from graphmoe.typing import Routing


class ContextualRouter(Router):
    r"""Routes a token by what *all* experts say about it, after they have heard one another.

    With :math:`O_n` the outputs of the ``E`` experts for token :math:`n` and a learned identity :math:`I` of
    each expert,

    .. math::
        Z_n = \mathrm{RMSNorm}\bigl(\mathrm{MHA}(O_n + I) + O_n\bigr), \qquad
        z_n = \frac1T W \cdot \frac1E \sum_e Z_{ne}, \qquad
        w_n = s\,\mathrm{softmax}(\mathrm{top}_k(z_n))

    Without the identities a mean over experts could not tell who said what: any permutation of the experts
    would give the same scores. The price is that every expert serves every token, whether it is chosen or
    not.

    Edges: expert -> expert of one token (attention), then token -> expert.

    Args:
        in_channels: Channels ``D`` of an expert's output.
        num_experts: ``E``.
        k: Experts a token is left with, ``1 <= k <= E``.
        heads: Attention heads; must divide ``D``.
        **options: Of :class:`~graphmoe.nn.route.Router`.

    Shapes:
        - **input:** ``x [N, E, D]``, the outputs of all experts, and ``mask``, ``offset``, ``batch`` as in
          :class:`TopKRouter`.
        - **output:** :class:`~graphmoe.typing.Routing` of ``N * k`` edges.

    Raises:
        ConfigError: ``k`` outside ``[1, E]``, heads that do not divide ``D``, or as
            :class:`~graphmoe.nn.route.Router`.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        heads: int = 4,
        **options,
    ):
        super().__init__(in_channels, num_experts, k, **options)
        self.identity = nn.Parameter(torch.empty(num_experts, in_channels))
        self.attention = RowAttention(in_channels, heads)
        self.norm = nn.RMSNorm(in_channels, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.identity, std=0.02)
        self.attention.reset_parameters()
        self.norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        context = self.norm(self.attention(x + self.identity.to(x.dtype)) + x)  # [N, E, D]
        return self.choose(self.scores(context.mean(dim=1), offset), mask)
