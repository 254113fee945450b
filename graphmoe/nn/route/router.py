r"""What routers share: they make the edges ``token --routes--> expert`` and weigh them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.typing import NEVER, Routing

SCORING_FUNCS = ("softmax", "sigmoid")


def sort_routes(expert: Tensor, weight: Tensor, logits: Tensor) -> Routing:
    """Sort the routing edges of tokens that have equally many places for them, absent ones included.

    Args:
        expert: Expert of each slot, ``[N, k]``; ``E`` for an absent edge.
        weight: Weight of each slot, ``[N, k]``; 0 for an absent edge.
        logits: Router scores, ``[N, E]``.
    """
    slots = expert.size(1)
    ordered, perm = expert.flatten().sort(stable=True)
    return Routing(
        token=perm.div(slots, rounding_mode="floor"),
        expert=ordered,
        weight=weight.flatten().index_select(0, perm),
        logits=logits,
        ptr=_offsets(ordered, logits.size(1)),
        perm=perm,
    )


def sort_edges(token: Tensor, expert: Tensor, weight: Tensor, logits: Tensor) -> Routing:
    """Sort routing edges of which a token may have any number.

    Args:
        token: Token of each edge, ``[R]``.
        expert: Expert of each edge, ``[R]``; ``E`` for an absent edge.
        weight: Weight of each edge, ``[R]``; 0 for an absent edge.
        logits: Router scores, ``[N, E]``.
    """
    ordered, order = expert.sort(stable=True)
    token = token.index_select(0, order)
    by_token = token.sort(stable=True).indices
    place = torch.arange(token.numel(), device=token.device)
    return Routing(
        token=token,
        expert=ordered,
        weight=weight.index_select(0, order),
        logits=logits,
        ptr=_offsets(ordered, logits.size(1)),
        perm=torch.empty_like(place).scatter_(0, by_token, place),
    )


def spread(routing: Routing) -> Routing:
    """The same edges with a place for every expert at every token, ``R = N * E``: slot ``e`` is expert ``e``.

    What works on the rows of one token, such as a coupling, needs equally many places for each.
    """
    tokens, experts = routing.logits.shape
    present = routing.expert < experts
    # Absent edges go to a place behind the last one.
    place = torch.where(present, routing.token * experts + routing.expert, tokens * experts)
    weight = routing.weight.new_zeros(tokens * experts + 1).index_add(0, place, routing.weight)
    served = torch.zeros(tokens * experts + 1, dtype=torch.bool, device=place.device)
    served = served.index_fill(0, place, True)[:-1].view(tokens, experts)
    ids = torch.arange(experts, device=place.device)
    expert = torch.where(served, ids, experts)
    return sort_routes(expert, weight[:-1].view(tokens, experts), routing.logits)


def _offsets(ordered: Tensor, num_experts: int) -> Tensor:
    """Where the edges of each expert begin among ascending experts ``[R]``, and the end, ``[E + 1]``."""
    return torch.searchsorted(ordered, torch.arange(num_experts + 1, device=ordered.device))


def sizes(group: Tensor, present: Tensor) -> Tensor:
    """How many of the elements of ``group [M]`` that are present belong to the group of each, ``[M]``.

    Groups may have any ids, as those of a batch in which some graphs are empty do.
    """
    ordered = torch.where(present, group, -1).sort().values  # ids are not negative
    return torch.searchsorted(ordered, group, right=True) - torch.searchsorted(ordered, group)


def pick(logits: Tensor, expert: Tensor) -> Tensor:
    """The scores ``[N, k]`` of chosen experts ``[N, k]``."""
    if not torch.compiler.is_compiling():
        return logits.gather(1, expert)
    # The gradient of a gather is a scatter, which compiled code of torch 2.13 may read before it is made if
    # several losses share the scores.
    ids = torch.arange(logits.size(1), device=logits.device)
    return torch.where(expert.unsqueeze(2) == ids, logits.unsqueeze(1), 0.0).sum(dim=-1)


class Router(nn.Module):
    r"""What routers share: from what they look at to a score of each expert, and from scores to weights.

    .. math::
        z = W x / T + \varepsilon, \qquad\text{or}\qquad z = W\,\mathrm{ReLU}(W_1 x + b_1) / T + \varepsilon

    with ``hidden_channels``, and Gaussian noise :math:`\varepsilon` in training only.

    Args:
        in_channels: Channels ``D`` of what is looked at.
        num_experts: ``E``.
        k: Edges a token, ``1 <= k <= E``.
        hidden_channels: Channels of a hidden layer. ``None``: scores are linear.
        scale: What the weights of a token sum to, :math:`s > 0`, or what they are multiplied with.
        temperature: :math:`T > 0`: below 1 weights are sharper, above 1 more even.
        noise_std: Standard deviation of the noise.
        scoring_func: ``softmax`` over experts, or ``sigmoid``.
        norm_topk_prob: Whether the weights of a token sum to ``s``.

    Attributes:
        causal: Whether the edges of a token depend on that token alone. A router that is not causal may
            not be put into a model that must not see the future.

    Raises:
        ConfigError: ``k`` outside ``[1, E]``, ``hidden_channels`` below 1, ``scale`` or ``temperature`` not
            positive, negative noise, an unknown scoring function.
    """

    causal = True

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        hidden_channels: int | None = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        noise_std: float = 0.0,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = True,
    ):
        if not 1 <= k <= num_experts:
            raise ConfigError("k must not exceed the number of experts", "k", f"1 <= k <= {num_experts}", k)
        if hidden_channels is not None and hidden_channels < 1:
            what, where = "a hidden layer without channels", "router_hidden_channels"
            raise ConfigError(what, where, "at least 1, or None", hidden_channels)
        if not 0 < scale < float("inf"):
            raise ConfigError("weights need a positive scale", "routed_scaling_factor", "> 0", scale)
        if not 0 < temperature < float("inf"):
            raise ConfigError("scores need a positive temperature", "router_temperature", "> 0", temperature)
        if not 0 <= noise_std < float("inf"):
            raise ConfigError("noise needs a size", "router_noise_std", ">= 0", noise_std)
        if scoring_func not in SCORING_FUNCS:
            expected = f"one of {', '.join(SCORING_FUNCS)}"
            raise ConfigError("unknown scoring function", "scoring_func", expected, scoring_func)
        super().__init__()
        self.in_channels, self.num_experts, self.k, self.scale = in_channels, num_experts, k, scale
        self.temperature, self.noise_std = temperature, noise_std
        self.scoring_func, self.norm_topk_prob = scoring_func, norm_topk_prob
        self.hidden = None if hidden_channels is None else nn.Linear(in_channels, hidden_channels)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_channels or in_channels))

    def reset_parameters(self) -> None:
        if self.hidden is not None:
            # Scores of a normalised token start as large as without the layer: a ReLU halves the power.
            nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
            nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.weight, std=self.weight.size(1) ** -0.5)

    def scores(self, x: Tensor, offset: Tensor | None) -> Tensor:
        """Logits ``[N, E]`` in at least fp32 whatever autocast says: in bf16 up to 2 % of tokens
        would be sent to another expert."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.hidden is not None:
                x = F.linear(x, self.hidden.weight.to(dtype), self.hidden.bias.to(dtype)).relu()
            logits = F.linear(x, self.weight.to(dtype))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.training and self.noise_std > 0:
            logits = logits + self.noise_std * torch.randn_like(logits)
        return logits if offset is None else logits + offset.to(dtype)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the scores ``[N, E]`` say of every expert by itself, ``[N, E]`` in [0, 1]."""
        return logits.softmax(dim=-1) if self.scoring_func == "softmax" else logits.sigmoid()

    def weigh(self, value: Tensor, logits: Tensor) -> Tensor:
        """Weights ``[N, k]`` of chosen experts with scores ``value [N, k]`` among all ``logits [N, E]``."""
        if self.scoring_func == "sigmoid":
            weight = value.sigmoid()
            if self.norm_topk_prob:
                # The floor is for scores of -100, where sigmoid is 0.
                weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        elif self.norm_topk_prob:
            weight = value.softmax(dim=-1)
        else:
            weight = (value - logits.logsumexp(dim=-1, keepdim=True)).exp()
        return self.scale * weight

    def choose(self, logits: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Routing:
        """Edges to the ``k`` experts of largest score plus ``bias [E]``; their weights know no bias."""
        wanted = logits.detach() if bias is None else logits.detach() + bias.to(logits.dtype)
        expert = largest(wanted, self.k)
        return self.edges(expert, pick(logits, expert), logits, mask)

    def edges(self, expert: Tensor, value: Tensor, logits: Tensor, mask: Tensor | None) -> Routing:
        """Edges to ``expert [N, k]`` with scores ``value [N, k]``; those to unreachable experts and those of
        masked tokens are absent."""
        present = ~(value <= NEVER / 2)  # a score that is no number is not hidden
        if mask is not None:
            present = present & mask.unsqueeze(1)
        expert = torch.where(present, expert, logits.size(1))
        return sort_routes(expert, self.weigh(value, logits) * present, logits)

    def __repr__(self) -> str:
        hidden = "" if self.hidden is None else f", hidden_channels={self.hidden.out_features}"
        return (
            f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts}, k={self.k}{hidden})"
        )


def largest(scores: Tensor, k: int) -> Tensor:
    """Ids ``[N, k]`` of the ``k`` largest scores ``[N, E]``, in descending order, ties by lowest id.

    ``topk`` breaks ties in no fixed order. For few choices, taking the first maximum ``k`` times is
    ten times faster than a stable sort.
    """
    if k > 4:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    chosen = []
    for _ in range(k):
        chosen.append(scores.max(dim=-1, keepdim=True).indices)
        scores = scores.scatter(1, chosen[-1], float("-inf"))
    return torch.cat(chosen, dim=1)
