import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from graphmoe.errors import ConfigError, GraphError
from graphmoe.nn.sparse.density import er_density, require_density
from graphmoe.nn.sparse.network import feeds
from graphmoe.nn.sparse.places import draw_absent, draw_places, largest_absent
from graphmoe.nn.sparse.weighted_sum_conv import WeightedSumConv
from graphmoe.ops.topology import Topology

GROWTH = ("random", "gradient")


class _LaidOut(NamedTuple):
    """A topology and the buffers, with their versions, that it was made of."""

    topology: Topology
    source: Tensor
    target: Tensor
    versions: tuple[int, int]


class SparseLinear(nn.Module):
    r"""A linear map whose weights are edges: what is no edge takes neither memory nor time.

    .. math::
        y_i = b_i + \sum_{j \to i} w_{ji} x_j

    The edges are drawn at random, every set of ``round(density * in * out)`` equally likely, and
    :meth:`rewire` lets them evolve (`SET <https://arxiv.org/abs/1707.04780>`_,
    `RigL <https://arxiv.org/abs/1911.11134>`_); their number never changes. They are part of the state, and
    checked when they were loaded. Samples are the channels of :class:`WeightedSumConv`, which passes the
    messages.

    Edges: neuron -> neuron.

    Args:
        in_channels: Sources.
        out_channels: Targets.
        density: Edges, as a share of all places, in (0, 1].
        epsilon: Instead of it: :math:`\epsilon (i + o) / (i o)`.
        bias: Add a bias.
        generator: Draws the edges, on the CPU; default: torch's own.

    Attributes:
        weight: Of each edge, ``[M]``.
        source, target: Of each edge, ``[M]`` int32, by target and then by source.
        born: Rewiring in which each edge came, ``[M]`` int32; 0: there from the start.
        rewirings: How often it was rewired, int64.

    Shapes:
        - **input:** ``[*, in_channels]``; with ``feature_major=True``, which is faster, ``[in_channels, N]``.
        - **output:** ``[*, out_channels]``, or ``[out_channels, N]``.

    Raises:
        ConfigError: Both or neither of ``density`` and ``epsilon``, a density outside (0, 1], or an
            ``epsilon`` that asks for more edges than places.
        GraphError: Edges in the state that are out of range, out of order or there twice.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        density: float | None = None,
        *,
        epsilon: float | None = None,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ConfigError("no number of channels", name, "at least 1", value)
        if (density is None) == (epsilon is None):
            raise ConfigError("how many edges?", "density", "either density or epsilon", density)
        if epsilon is not None:
            density = er_density(epsilon, in_channels, out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels
        count = max(1, round(require_density(density) * self.num_places))
        place = draw_places(self.num_places, count, generator)
        self.weight = nn.Parameter(torch.empty(count))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("source", (place % in_channels).int())
        self.register_buffer("target", place.div(in_channels, rounding_mode="floor").int())
        self.register_buffer("born", torch.zeros_like(self.source))
        self.register_buffer("rewirings", torch.zeros((), dtype=torch.int64))
        self.conv = WeightedSumConv()
        self.conv.explain = False  # an Explainer of a graph around the layer has other edges
        self._laid_out: _LaidOut | None = None
        self.register_load_state_dict_post_hook(_check_loaded)
        self.reset_parameters()
        self._lay_out()

    def reset_parameters(self) -> None:
        """He's normal weights for the mean number of edges that a target has."""
        nn.init.normal_(self.weight, std=self.weight_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight_std(self) -> float:
        """Standard deviation of first weights."""
        return (2 * self.out_channels / self.num_edges) ** 0.5

    @property
    def num_edges(self) -> int:
        return self.weight.numel()

    @property
    def num_places(self) -> int:
        """Edges that there could be."""
        return self.in_channels * self.out_channels

    @property
    def density(self) -> float:
        return self.num_edges / self.num_places

    def edge_index(self) -> Tensor:
        """``[2, M]`` int64 (source, target); ids of sources and of targets begin at 0 each."""
        return torch.stack([self.source, self.target]).long()

    def topology(self) -> Topology:
        """The edges as the sparse product wants them, checked and laid out anew when they have changed."""
        found = self._laid_out
        if found is None or found.source is not self.source or found.target is not self.target:
            return self._lay_out()
        if torch.compiler.is_compiling():  # what changes edges in place lays them out
            return found.topology
        versions = (self.source._version, self.target._version)
        return found.topology if versions == found.versions else self._lay_out()

    def forward(self, x: Tensor, *, feature_major: bool = False) -> Tensor:
        if x.size(0 if feature_major else -1) != self.in_channels or (feature_major and x.dim() != 2):
            expected = f"[{self.in_channels}, N]" if feature_major else f"[*, {self.in_channels}]"
            raise GraphError("input of other channels", "x", expected, tuple(x.shape))
        nodes = x if feature_major else x.reshape(-1, self.in_channels).t()  # [in, N]
        ends = (nodes, nodes.new_empty(self.out_channels, 0))
        out = self.conv(ends, self.topology(), self.weight, self.bias)
        return out if feature_major else out.t().reshape(*x.shape[:-1], self.out_channels)

    @torch.no_grad()
    def rewire(
        self,
        fraction: float = 0.3,
        growth: str = "random",
        *,
        gradient: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Drop the weakest edges and grow as many, of weight 0, where there were none.

        ``random`` growth is SET's: it drops a ``fraction`` of the smallest positive weights and the same of
        the largest negative ones. ``gradient`` is RigL's: it drops those of least magnitude and grows where
        the loss would fall fastest. What is dropped does not come back in the same rewiring. Where fewer
        places are free, fewer edges move; a full layer stays as it is.

        Args:
            fraction: Of the edges, in [0, 1].
            growth: ``random`` or ``gradient``.
            gradient: Of the loss to all places, ``[out_channels, in_channels]``, for ``gradient``.
            generator: Of the CPU, for ``random``; default: torch's own.

        Returns:
            Where each edge stood before, ``[M]`` int64, and -1 for a new one: what belongs to edges, such
            as moments of an optimiser, has to move with them.

        Raises:
            ConfigError: A fraction outside [0, 1], unknown growth, or a gradient of another shape.
        """
        self._check_rewiring(fraction, growth, gradient)
        count, free = self.num_edges, self.num_places - self.num_edges
        weakest = _weakest(self.weight, min(fraction, free / count), by_sign=growth == "random")
        place = self.target.long() * self.in_channels + self.source
        if growth == "random":
            grown = draw_absent(place, self.num_places, weakest.numel(), generator)
        else:
            grown = largest_absent(gradient.abs().flatten(), place, weakest.numel())
        kept = torch.ones_like(place, dtype=torch.bool).index_fill_(0, weakest, False).nonzero().flatten()
        place, order = torch.cat([place.index_select(0, kept), grown]).sort()
        origin = torch.cat([kept, torch.full_like(grown, -1)]).index_select(0, order)
        old, new = origin.clamp(min=0), origin < 0
        self.rewirings += 1
        self.weight.copy_(self.weight.index_select(0, old).masked_fill(new, 0))
        self.born.copy_(torch.where(new, self.rewirings.int(), self.born.index_select(0, old)))
        self.source.copy_(place % self.in_channels)
        self.target.copy_(place.div(self.in_channels, rounding_mode="floor"))
        self._lay_out()
        return origin

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """``[out_channels, in_channels]``, 0 where there is no edge."""
        dense = self.weight.new_zeros(self.out_channels, self.in_channels)
        return dense.index_put_((self.target.long(), self.source.long()), self.weight)

    @torch.no_grad()
    def age(self) -> Tensor:
        """Rewirings that each edge has survived, ``[M]`` int64."""
        return self.rewirings - self.born

    def survival(self) -> float:
        """Share of the first edges that are still there."""
        return (self.born == 0).double().mean().item()

    def to_hetero(self) -> HeteroData:
        """The layer as a typed graph, see :func:`~graphmoe.nn.sparse.network.feeds`."""
        return feeds([self])

    def to_networkx(self):
        """The layer as a directed graph of networkx: neurons with their ``layer``, edges with ``weight``."""
        from torch_geometric.utils import to_networkx

        return to_networkx(self.to_hetero().to_homogeneous(), node_attrs=["layer"], edge_attrs=["weight"])

    def extra_repr(self) -> str:
        edges = f"edges={self.num_edges}, density={self.density:.4g}, bias={self.bias is not None}"
        return f"{self.in_channels}, {self.out_channels}, {edges}"

    def __deepcopy__(self, memo: dict) -> "SparseLinear":
        # What is laid out can be made again, and belongs to the buffers of the original.
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        for key, value in vars(self).items():
            vars(other)[key] = None if key == "_laid_out" else copy.deepcopy(value, memo)
        return other

    @torch.compiler.disable
    def _lay_out(self) -> Topology:
        place = self.target.long() * self.in_channels + self.source
        for name in ("source", "target"):
            if getattr(self, name).shape != self.weight.shape:
                got = tuple(getattr(self, name).shape)
                raise GraphError("not one id an edge", name, f"[{self.num_edges}]", got)
        made = Topology(self.edge_index(), (self.in_channels, self.out_channels))
        if bool((place.diff() <= 0).any()):
            raise GraphError("edges out of order or there twice", "target", "by target, then by source")
        if self._laid_out is not None and self._laid_out.topology.ptr.device == made.ptr.device:
            made = self._laid_out.topology.copy_(made)
        versions = (self.source._version, self.target._version)
        self._laid_out = _LaidOut(made, self.source, self.target, versions)
        return made

    def _check_rewiring(self, fraction: float, growth: str, gradient: Tensor | None) -> None:
        if not 0 <= fraction <= 1:
            raise ConfigError("no share of the edges", "fraction", "from 0 to 1", fraction)
        if growth not in GROWTH:
            raise ConfigError("unknown growth", "growth", f"one of {', '.join(GROWTH)}", growth)
        shape = (self.out_channels, self.in_channels)
        if growth == "gradient" and (gradient is None or gradient.shape != shape):
            got = None if gradient is None else tuple(gradient.shape)
            raise ConfigError("not the gradient of all places", "gradient", str(list(shape)), got)


def _weakest(weight: Tensor, fraction: float, *, by_sign: bool) -> Tensor:
    """Edges to drop: ``fraction`` of all, or of those with and of those without a minus sign."""
    order = weight.abs().sort(stable=True).indices
    if not by_sign:
        return order[: int(fraction * order.numel())]
    negative = weight.index_select(0, order) < 0
    parts = [order[~negative], order[negative]]
    return torch.cat([part[: int(fraction * part.numel())] for part in parts])


def _check_loaded(module: SparseLinear, keys: object) -> None:
    if module.source.device.type != "meta":
        module.topology()
