import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.nn.route.router import Router
from graphmoe.typing import Routing


class TopKRouter(Router):
    r"""Token choice: every token takes the ``k`` experts of largest score (`Shazeer et al.
    <https://arxiv.org/abs/1701.06538>`_).

    .. math::
        z_n = W x_n / T + \varepsilon + o, \quad w_n = s\,\mathrm{softmax}(\mathrm{top}_k(z_n))

    with Gaussian noise :math:`\varepsilon` in training only. Without ``norm_topk_prob`` the weights are the
    probabilities among all ``E`` experts, :math:`s\,\mathrm{softmax}(z_n)`, so that a router learns from its
    task even at ``k = 1``; with ``scoring_func="sigmoid"`` they are :math:`s\,\sigma(z_n)`, divided by their
    sum over the ``k`` or not. Ties go to the lowest expert id. The choice of one token depends on that token
    alone, so the router is causal.

    With ``bias`` the load is balanced without an auxiliary loss (`Wang et al.
    <https://arxiv.org/abs/2408.15664>`_): experts are chosen by :math:`z_n + b`, weights know no :math:`b`,
    and
    :meth:`rebalance`, called by a training callback after each step, moves

    .. math::
        b_e \leftarrow b_e + u\,\mathrm{sign}(\bar c - c_e), \qquad b \leftarrow b - \bar b

    where :math:`c_e` is the number of edges of an expert in the step. What is stored is how many steps ``b``
    went up and down, as integers, which neither a cast of the model nor rounding can move.

    Args:
        in_channels: Channels ``D`` of a token.
        num_experts: ``E``.
        k: Edges a token, ``1 <= k <= E``.
        bias: Whether to balance by :math:`b`.
        bias_rate: :math:`u > 0`, in units of the scores.
        **options: ``hidden_channels``, ``scale``, ``temperature``, ``noise_std``, ``scoring_func`` and
            ``norm_topk_prob`` of :class:`~graphmoe.nn.route.Router`.

    Shapes:
        - **input:** ``x [N, D]``, ``mask [N]`` bool (False: no edges), ``offset [E]`` added to the
          scores (``-1e4`` removes an expert), ``batch [N]`` ignored: a token's choice does not
          depend on its graph.
        - **output:** :class:`~graphmoe.typing.Routing` of ``N * k`` edges.

    Raises:
        ConfigError: ``bias_rate`` not positive, or as :class:`~graphmoe.nn.route.Router`.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int,
        *,
        bias: bool = False,
        bias_rate: float = 1e-3,
        **options,
    ):
        if not 0 < bias_rate < float("inf"):
            raise ConfigError("a bias moves by some amount", "router_bias_rate", "> 0", bias_rate)
        super().__init__(in_channels, num_experts, k, **options)
        self.bias_rate = bias_rate
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.long) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias_steps is not None:
            self.bias_steps.zero_()

    def bias(self) -> Tensor | None:
        """What is added to the scores before experts are chosen, ``[E]`` of mean 0, if anything is."""
        if self.bias_steps is None:
            return None
        steps = self.bias_steps.float()
        return self.bias_rate * (steps - steps.mean())

    @torch.no_grad()
    def rebalance(self, counts: Tensor, live: Tensor | None = None) -> None:
        """Make experts that served more than the mean less attractive, and the others more so.

        Args:
            counts: Edges that each expert was given in a step, by all processes, ``[E]``.
            live: Experts that can be chosen, ``[E]`` bool. The bias of the others stays.
        """
        live = torch.ones_like(counts, dtype=torch.bool) if live is None else live
        counts = torch.where(live, counts, 0)
        # sign(mean - count) in integers: a mean in floating point may miss the count that equals it.
        self.bias_steps += torch.where(live, (counts.sum() - counts * live.sum()).sign(), 0)

    def forward(
        self,
        x: Tensor,
        *,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Routing:
        return self.choose(self.scores(x, offset), mask, self.bias())


class DenseRouter(Router):
    r"""Every expert serves every token, ``k = E``, with weights ``s softmax(W x / T + noise + o)``, or with
    ``scoring_func="sigmoid"`` those of the sigmoid.

    Slot ``e`` of a token is expert ``e``. Arguments and shapes as :class:`TopKRouter`, without a bias, as
    there is no choice.
    """

    def __init__(self, in_channels: int, num_experts: int, **options):
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
