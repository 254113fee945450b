import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.nn.route.router import Router, largest, sort_routes
from graphmoe.typing import NEVER, Routing


class ThresholdRouter(Router):
    r"""The causal form of expert choice: token ``n`` goes to expert ``e`` when its probability exceeds what,
    so far, it took to be among the

    .. math::
        C = \lceil k N / E \rceil

    tokens of a batch that the expert prefers:

    .. math::
        p_{ne} > \theta_e, \qquad \theta_e \leftarrow \beta\,\theta_e + (1 - \beta)\,p_{(C)e}, \qquad w_{ne} =
        s\,p_{ne}

    with :math:`p = \mathrm{softmax}(W x / T + \varepsilon)` over experts and :math:`p_{(C)e}` the middle
    between the C-th largest of a batch and the next (with the C-th itself that batch would be left with one
    token less). A token has between 0 and ``E`` edges, ``k`` in the mean; one without any passes by the
    residual.

    :math:`\theta` is a buffer that no forward pass moves, so the edges of a token depend on that token alone.
    A training callback calls :meth:`observe` after each step. Before the first one, tokens take their ``k``
    best experts; in the first steps the mean of all observations counts, however large :math:`\beta` is.

    Args:
        in_channels: Channels ``D`` of a token.
        num_experts: ``E``.
        k: Edges a token in the mean, ``1 <= k <= E``.
        decay: :math:`\beta` in [0, 1).
        norm_topk_prob: Whether the weights of a token sum to ``s``.
        **options: Of :class:`~graphmoe.nn.route.Router`.

    Shapes:
        - **input:** ``x [N, D]``, ``mask``, ``offset`` and ``batch`` as in
          :class:`~graphmoe.nn.route.TopKRouter`.
        - **output:** :class:`~graphmoe.typing.Routing` of ``N * E`` edges, those under the threshold absent.

    Raises:
        ConfigError: ``decay`` outside [0, 1), or as :class:`~graphmoe.nn.route.Router`.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        decay: float = 0.9,
        norm_topk_prob: bool = False,
        **options,
    ):
        if not 0 <= decay < 1:
            raise ConfigError("thresholds would never move, or run away", "decay", ">= 0 and < 1", decay)
        super().__init__(in_channels, num_experts, k, norm_topk_prob=norm_topk_prob, **options)
        self.decay = decay
        self.register_buffer("threshold", torch.zeros(num_experts))
        self.register_buffer("observed", torch.zeros((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.threshold.zero_()
        self.observed.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        logits = self.scores(x, offset)
        probability = self.probabilities(logits)
        score = probability.detach()
        best = torch.zeros_like(score, dtype=torch.bool).scatter(1, largest(score, self.k), True)
        chosen = torch.where(self.observed > 0, ~(score <= self.threshold.to(score.dtype)), best)
        chosen = chosen & ~(logits.detach() <= NEVER / 2)  # a score that is no number is not hidden
        if mask is not None:
            chosen = chosen & mask.unsqueeze(1)
        weight = probability * chosen
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        ids = torch.arange(self.num_experts, device=x.device)
        return sort_routes(torch.where(chosen, ids, self.num_experts), self.scale * weight, logits)

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Move the thresholds towards the C-th largest probability of each expert in a batch.

        Args:
            logits: Scores of the tokens of the batch, those of all processes and no padding, ``[N, E]``.
                Without any the thresholds stay.
        """
        tokens = logits.size(0)
        if not tokens:
            return
        # An expert that cannot be chosen leaves no gap: the others take its share.
        live = int((logits > NEVER / 2).any(dim=0).sum())
        capacity = min(tokens, -(-self.k * tokens // max(live, 1)))
        score = self.probabilities(logits)
        ordered = score.sort(dim=0, descending=True).values
        border = (ordered[capacity - 1] + ordered[min(capacity, tokens - 1)]) / 2
        share = max(1 - self.decay, 1 / (int(self.observed) + 1))
        self.threshold.lerp_(border.to(self.threshold.dtype), share)
        self.observed += 1
