"""How many edges each layer of a sparse network gets."""

from collections.abc import Collection, Sequence

from graphmoe.errors import ConfigError

DISTRIBUTIONS = ("uniform", "er", "erk")


def er_density(epsilon: float, in_channels: int, out_channels: int) -> float:
    r"""Density :math:`\epsilon (i + o) / (i o)` of an Erdős–Rényi layer
    (`SET <https://arxiv.org/abs/1707.04780>`_).

    Raises:
        ConfigError: It has no edges, or more than places.
    """
    most = in_channels * out_channels / (in_channels + out_channels)
    if not 0 < epsilon <= most:
        expected = f"above 0, at most {most:g}"
        raise ConfigError("no number of edges for this layer", "epsilon", expected, epsilon)
    return epsilon / most


def er_total_density(
    shapes: Sequence[tuple[int, int]], epsilon: float, *, dense: Collection[int] = ()
) -> float:
    r"""Density of a whole network whose layers have :math:`\epsilon (i + o)` edges each
    (`SET <https://arxiv.org/abs/1707.04780>`_): the one with which :func:`allocate_density` by ``er`` gives
    each layer its :func:`er_density`.

    Args:
        shapes: Channels ``(in, out)`` of each layer.
        epsilon: Edges a neuron.
        dense: Layers that have all their edges, which count.

    Raises:
        ConfigError: A layer that is not dense has no edges, or more than places.
    """
    places = [sources * targets for sources, targets in shapes]
    edges = [
        places[layer] if layer in dense else er_density(epsilon, *shape) * places[layer]
        for layer, shape in enumerate(shapes)
    ]
    return sum(edges) / sum(places)


def require_density(density: float, name: str = "density") -> float:
    """Refuse a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise ConfigError("no share of the places", name, "above 0, at most 1", density)
    return density


def allocate_density(
    shapes: Sequence[tuple[int, int]],
    density: float,
    distribution: str = "uniform",
    *,
    dense: Collection[int] = (),
) -> list[float]:
    r"""Densities of layers whose edges together are ``density`` of all places.

    ``uniform`` gives every layer the same; ``er`` one proportional to :math:`(i + o) / (i o)`, at most 1,
    so that small layers are denser (`SET <https://arxiv.org/abs/1707.04780>`_). ``erk``, which
    `RigL <https://arxiv.org/abs/1911.11134>`_ uses, differs from it in kernels of convolutions only.

    Args:
        shapes: Channels ``(in, out)`` of each layer.
        density: Share of all places, in (0, 1].
        distribution: ``uniform``, ``er`` or ``erk``.
        dense: Layers that have all their edges, which count.

    Raises:
        ConfigError: A density or a distribution that there is not, or dense layers that alone have more.
    """
    require_density(density)
    if distribution not in DISTRIBUTIONS:
        expected = f"one of {', '.join(DISTRIBUTIONS)}"
        raise ConfigError("unknown distribution of edges", "distribution", expected, distribution)
    places = [sources * targets for sources, targets in shapes]
    full = set(dense) if density < 1 else set(range(len(shapes)))
    share = {
        layer: 1.0 if distribution == "uniform" else sum(shape) / places[layer]
        for layer, shape in enumerate(shapes)
    }
    while True:
        rest = [layer for layer in range(len(shapes)) if layer not in full]
        if not rest:
            return [1.0] * len(shapes)
        left = density * sum(places) - sum(places[layer] for layer in full)
        if left <= 0:
            least = sum(places[layer] for layer in full) / sum(places)
            what = "dense layers alone have more edges"
            raise ConfigError(what, "density", f"above {least:.4g}", density)
        scale = left / sum(share[layer] * places[layer] for layer in rest)
        over = {layer for layer in rest if scale * share[layer] > 1}
        if not over:
            return [1.0 if layer in full else scale * share[layer] for layer in range(len(shapes))]
        full |= over
