"""From the words of a configuration to the parts of a mixture."""

from collections.abc import Mapping

from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.nn.couple import CollabConv, CoupleConv, HyperCoupleConv
from graphmoe.nn.expert import ExpertConv, IterativeExpert
from graphmoe.nn.fuse import GatedFusion, ProjectedFusion, SumFusion
from graphmoe.nn.route import (
    ContextualRouter,
    DenseRouter,
    ExpertChoiceRouter,
    Router,
    ThresholdRouter,
    TopKRouter,
)
from graphmoe.nn.sparse.density import DISTRIBUTIONS, require_density
from graphmoe.nn.sparse_expert import SparseExpert

COUPLINGS = ("none", "gnn", "hyper", "collab")
_ROUTERS = {
    "topk": TopKRouter,
    "contextual": ContextualRouter,
    "threshold": ThresholdRouter,
    "expert_choice": ExpertChoiceRouter,
}
ROUTERS = tuple(_ROUTERS)
FUSIONS = ("sum", "mean", "gated")


def resolve_router(name: str, in_channels: int, num_experts: int, k: int, **options) -> Router:
    """The router called ``name``; ``topk`` with ``k = num_experts`` needs no choice.

    Args:
        name: ``topk``, ``contextual``, ``threshold`` or ``expert_choice``.
        in_channels: Channels ``D``.
        num_experts: ``E``, ghosts included.
        k: Experts a token.
        **options: Of the router's class.

    Raises:
        ConfigError: An unknown name or option.
    """
    _known("router", name, ROUTERS)
    if name == "topk" and k == num_experts:
        return _make(DenseRouter, "router_kwargs", options, in_channels, num_experts)
    return _make(_ROUTERS[name], "router_kwargs", options, in_channels, num_experts, k)


def resolve_experts(
    in_channels: int,
    hidden_channels: int,
    num_experts: int,
    *,
    activation: str,
    steps: int,
    density: float | None,
    distribution: str,
) -> ExpertConv | SparseExpert:
    """Experts that are applied once (``steps=0``), or in an iterative reasoning loop; with a ``density``
    below 1 their weights are edges.

    Raises:
        ConfigError: A negative number of steps, an unknown activation or distribution, a density outside
            (0, 1], or sparse experts that reason.
    """
    if density is not None and density != 1:
        require_density(density, "expert_density")
        _known("expert_distribution", distribution, DISTRIBUTIONS)
        if steps:
            what = "sparse experts are applied once"
            raise ConfigError(what, "reasoning_steps", "0 with expert_density", steps)
        return SparseExpert(in_channels, hidden_channels, num_experts, density=density,
                            distribution=distribution, activation=activation)  # fmt: skip
    if steps == 0:
        return ExpertConv(in_channels, hidden_channels, num_experts, activation=activation)
    return IterativeExpert(in_channels, hidden_channels, num_experts, activation=activation, steps=steps)


def resolve_coupling(
    name: str, in_channels: int, num_experts: int, *, layers: int | None, options: Mapping
) -> list[nn.Module]:
    """The couplers of a layer, applied one after another; none for ``none`` or no rounds of collaboration.

    Args:
        name: ``none``, ``gnn``, ``hyper`` or ``collab``.
        in_channels: Channels ``D`` of a row.
        num_experts: ``E``, ghosts included.
        layers: Rounds; ``None``: 1 for ``hyper``, else 2. Those of ``collab`` share their weights.
        options: Of the class of the coupler.

    Raises:
        ConfigError: An unknown name or option, or too few rounds.
    """
    _known("coupling", name, COUPLINGS)
    if layers is not None and layers < (0 if name == "collab" else 1):
        raise ConfigError("too few rounds", "coupling_layers", "at least 1, or 0 of collab", layers)
    rounds = (1 if name == "hyper" else 2) if layers is None else layers
    if name == "none":
        return []
    if name == "collab":
        if rounds == 0:
            return []
        options = {**options, "rounds": rounds}
        return [_make(CollabConv, "coupling_kwargs", options, in_channels, num_experts)]
    conv = CoupleConv if name == "gnn" else HyperCoupleConv
    return [_make(conv, "coupling_kwargs", options, in_channels, num_experts) for _ in range(rounds)]


def resolve_fusion(name: str, channels: int, *, projection: bool, mediator: bool) -> nn.Module:
    """The fusion called ``name``; ``mean`` is a sum with equal weights.

    Raises:
        ConfigError: An unknown name; a mediator that only ``gated`` listens to, or ``gated`` with a second
            projection.
    """
    _known("fusion", name, FUSIONS)
    if mediator and name != "gated":
        raise ConfigError("nobody listens to the mediator", "fusion", "gated, or no mediator", name)
    if name == "gated":
        if projection:
            raise ConfigError("gated fusion has a projection of its own", "fusion_projection", False, True)
        return GatedFusion(channels, mediator=mediator)
    return ProjectedFusion(channels) if projection else SumFusion()


def _known(field: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ConfigError(f"unknown {field}", field, f"one of {', '.join(names)}", name)


def _make(kind: type, field: str, options: Mapping, *sizes: int) -> nn.Module:
    try:
        return kind(*sizes, **options)
    except TypeError as error:  # Python's own word for an argument that is not there
        raise ConfigError(f"{kind.__name__} does not take this", field, got=str(error)) from error
