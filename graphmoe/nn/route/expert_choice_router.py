from fractions import Fraction

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.nn.route.router import Router, sizes, sort_edges, sort_routes
from graphmoe.typing import NEVER, Routing


class ExpertChoiceRouter(Router):
    r"""Expert choice: every expert takes the tokens that score highest on it (`Zhou et al.
    <https://arxiv.org/abs/2202.09368>`_), exactly

    .. math::
        C = \min\bigl(N, \lceil \mathrm{capacity\_factor} \cdot N / E \rceil\bigr), \qquad
        w_{ne} = s\,p_{ne}, \quad p = \mathrm{softmax}(W x / T + \varepsilon)

    so that the load is even by construction. Tokens may be chosen by several experts or by none; the latter
    pass by the residual. Ties go to the earlier token.

    Whether a token is chosen depends on all others it is with, later ones included: the router is **not**
    causal. It is for encoders, classifiers and the nodes of graphs; :class:`ThresholdRouter` is its causal
    form.

    Args:
        in_channels: Channels ``D`` of a token.
        num_experts: ``E``.
        k: Edges a token in the mean, ``1 <= k <= E``: what ``capacity_factor`` is if it is not given.
        capacity_factor: Edges a token in the mean where it is no whole number, in ``(0, E]``.
        norm_topk_prob: Whether the weights of a token that is chosen sum to ``s``.
        **options: Of :class:`~graphmoe.nn.route.Router`.

    Shapes:
        - **input:** ``x [N, D]``, ``mask [N]`` bool (False: nobody may take this token, and ``N`` counts the
          others), ``batch [N]``: the graph of each token: experts then take their tokens, and ``N`` is
          counted, in each graph, as if it were alone.
        - **output:** :class:`~graphmoe.typing.Routing` of ``E * C`` edges; with ``batch`` of ``N * E``, of
          which those are absent that were not chosen.

    Raises:
        ConfigError: A ``capacity_factor`` outside ``(0, E]``, an ``offset`` (experts that sleep would keep
            their share), or as :class:`~graphmoe.nn.route.Router`.
    """

    causal = False

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        capacity_factor: float | None = None,
        norm_topk_prob: bool = False,
        **options,
    ):
        super().__init__(in_channels, num_experts, k, norm_topk_prob=norm_topk_prob, **options)
        if capacity_factor is None:
            capacity_factor = k
        if not 0 < capacity_factor <= num_experts:
            what, expected = "no number of experts a token", f"> 0 and at most num_experts = {num_experts}"
            raise ConfigError(what, "capacity_factor", expected, capacity_factor)
        self.capacity_factor = capacity_factor
        self.reset_parameters()

    def capacity(self, tokens: int | Tensor) -> int | Tensor:
        """Tokens that each expert takes of ``tokens``: exact, as 1.1 * 10 is more than 11 in floating
        point."""
        ratio = Fraction(str(self.capacity_factor)) / self.num_experts
        # At most all of them, as the factor is at most E.
        return (ratio.numerator * tokens + ratio.denominator - 1) // ratio.denominator

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        if offset is not None:
            raise ConfigError("experts that sleep would keep their share", "offset", None, "a tensor")
        logits = self.scores(x, None)
        probability = self.probabilities(logits)  # [N, E]
        wanted = probability.detach().t().contiguous()  # [E, N]
        if mask is not None:
            wanted = torch.where(mask, wanted, NEVER)
        by_score = wanted.sort(dim=1, descending=True, stable=True).indices
        if batch is None:
            return self._of_all(by_score, probability, logits, mask)
        return self._of_each_graph(by_score, probability, logits, mask, batch)

    def _of_all(self, by_score: Tensor, probability: Tensor, logits: Tensor, mask: Tensor | None) -> Routing:
        tokens, experts = logits.shape
        token = by_score[:, : self.capacity(tokens)]  # [E, C]
        expert = torch.arange(experts, device=token.device).unsqueeze(1).expand_as(token)
        weight = self._weights(probability, token, expert)
        if mask is not None:
            # Room for as many as without the mask keeps shapes static; what is too much of it stays empty.
            rank = torch.arange(token.size(1), device=token.device)
            taken = (rank < self.capacity(mask.sum())).expand_as(token)
            expert, weight = torch.where(taken, expert, experts), weight * taken
        if self.norm_topk_prob:
            total = weight.new_zeros(tokens).index_add(0, token.flatten(), weight.flatten())
            weight = weight / total.clamp(min=1e-20)[token]
        return sort_edges(token.flatten(), expert.flatten(), self.scale * weight.flatten(), logits)

    def _of_each_graph(
        self, by_score: Tensor, probability: Tensor, logits: Tensor, mask: Tensor | None, batch: Tensor
    ) -> Routing:
        tokens, experts = logits.shape
        present = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask
        capacity = self.capacity(sizes(batch, present))  # [N]
        ordered, by_graph = batch[by_score].contiguous().sort(dim=1, stable=True)  # [E, N]
        place = torch.arange(tokens, device=batch.device)
        rank = place - torch.searchsorted(ordered, ordered)  # among the tokens of its graph
        token = by_score.gather(1, by_graph)
        taken = (rank < capacity[token]) & present[token]
        chosen = torch.zeros_like(taken).scatter(1, token, taken).t()  # [N, E]
        weight = probability * chosen
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        ids = torch.arange(experts, device=batch.device)
        return sort_routes(torch.where(chosen, ids, experts), self.scale * weight, logits)

    @staticmethod
    def _weights(probability: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        """Probabilities ``[E, C]`` of the edges; ``index_select`` has a far cheaper gradient than
        ``x[i]``."""
        place = (token * probability.size(1) + expert).flatten()
        return probability.flatten().index_select(0, place).view(token.shape)
