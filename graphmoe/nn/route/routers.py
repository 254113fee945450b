r"""Routers: they make the edges ``token --routes--> expert`` and weigh them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.typing import NEVER, Routing


def sort_routes(expert: Tensor, weight: Tensor, logits: Tensor) -> Routing:
    """Sort routing edges by expert.

    Args:
        expert: Expert of each slot, ``[N, k]``; ``E`` for an absent edge.
        weight: Weight of each slot, ``[N, k]``; 0 for an absent edge.
        logits: Router scores, ``[N, E]``.
    """
    slots = expert.size(1)
    ordered, perm = expert.flatten().sort(stable=True)
    experts = torch.arange(logits.size(1) + 1, device=logits.device)
    return Routing(
        token=perm.div(slots, rounding_mode="floor"),
        expert=ordered,
        weight=weight.flatten().index_select(0, perm),
        logits=logits,
        ptr=torch.searchsorted(ordered, experts),
        perm=perm,
    )


def pick(logits: Tensor, expert: Tensor) -> Tensor:
    """The scores ``[N, k]`` of chosen experts ``[N, k]``."""
    if not torch.compiler.is_compiling():
        return logits.gather(1, expert)
    # The gradient of a gather is a scatter, which compiled code of torch 2.13 may read before it is made if
    # several losses share the scores.
    ids = torch.arange(logits.size(1), device=logits.device)
    return torch.where(expert.unsqueeze(2) == ids, logits.unsqueeze(1), 0.0).sum(dim=-1)


class Router(nn.Module):
    """What routers share: a linear map from what they look at to a score of each expert."""

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        scale: float,
        temperature: float,
        noise_std: float,
    ):
        if not 1 <= k <= num_experts:
            raise ConfigError("k must not exceed the number of experts", "k", f"1 <= k <= {num_experts}", k)
        if not 0 < scale < float("inf"):
            raise ConfigError("weights need a positive scale", "routed_scaling_factor", "> 0", scale)
        if not 0 < temperature < float("inf"):
            raise ConfigError("scores need a positive temperature", "router_temperature", "> 0", temperature)
        if not 0 <= noise_std < float("inf"):
            raise ConfigError("noise needs a size", "router_noise_std", ">= 0", noise_std)
        super().__init__()
        self.in_channels, self.num_experts, self.k, self.scale = in_channels, num_experts, k, scale
        self.temperature, self.noise_std = temperature, noise_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_channels))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_channels**-0.5)

    def scores(self, x: Tensor, offset: Tensor | None) -> Tensor:
        """Logits ``[N, E]`` in at least fp32 whatever autocast says: in bf16 up to 2 % of tokens
        would be sent to another expert."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.training and self.noise_std > 0:
            logits = logits + self.noise_std * torch.randn_like(logits)
        return logits if offset is None else logits + offset.to(dtype)

    def choose(self, logits: Tensor, mask: Tensor | None) -> Routing:
        """Edges to the ``k`` experts of largest score, weighted by a softmax over these scores."""
        expert = largest(logits.detach(), self.k)
        return self.edges(expert, pick(logits, expert), logits, mask)

    def edges(self, expert: Tensor, value: Tensor, logits: Tensor, mask: Tensor | None) -> Routing:
        """Edges to ``expert [N, k]`` with scores ``value [N, k]``; those to unreachable experts and those of
        masked tokens are absent."""
        present = value > NEVER / 2
        if mask is not None:
            present = present & mask.unsqueeze(1)
        expert = torch.where(present, expert, logits.size(1))
        return sort_routes(expert, self.scale * value.softmax(dim=-1) * present, logits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, num_experts={self.num_experts}, k={self.k})"


class TopKRouter(Router):
    r"""Token choice: every token takes the ``k`` experts of largest score (`Shazeer et al.
    <https://arxiv.org/abs/1701.06538>`_).

    .. math::
        z_n = W x_n / T + \varepsilon + o, \quad w_n = s\,\mathrm{softmax}(\mathrm{top}_k(z_n))

    with Gaussian noise :math:`\varepsilon` in training only. Ties go to the lowest expert id. The choice of
    one token depends on that token alone, so the router is causal.

    Args:
        in_channels: Channels ``D`` of a token.
        num_experts: ``E``.
        k: Edges a token, ``1 <= k <= E``.
        scale: What the weights of a token sum to, :math:`s > 0`.
        temperature: :math:`T > 0`: below 1 weights are sharper, above 1 more even.
        noise_std: Standard deviation of the noise.

    Shapes:
        - **input:** ``x [N, D]``, ``mask [N]`` bool (False: no edges), ``offset [E]`` added to the
          scores (``-1e4`` removes an expert), ``batch [N]`` ignored: a token's choice does not
          depend on its graph.
        - **output:** :class:`~graphmoe.typing.Routing` of ``N * k`` edges.

    Raises:
        ConfigError: ``k`` outside ``[1, E]``, ``scale`` or ``temperature`` not positive, negative noise.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
        noise_std: float = 0.0,
    ):
        options = {"scale": scale, "temperature": temperature, "noise_std": noise_std}
        super().__init__(in_channels, num_experts, k, **options)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        return self.choose(self.scores(x, offset), mask)


class DenseRouter(Router):
    r"""Every expert serves every token, ``k = E``, with weights ``s softmax(W x / T + noise + o)``.

    Slot ``e`` of a token is expert ``e``. Arguments and shapes as :class:`TopKRouter`.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
        noise_std: float = 0.0,
    ):
        options = {"scale": scale, "temperature": temperature, "noise_std": noise_std}
        super().__init__(in_channels, num_experts, num_experts, **options)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        logits = self.scores(x, offset)
        expert = torch.arange(self.num_experts, device=x.device).expand_as(logits)
        return self.edges(expert, logits, logits, mask)


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
