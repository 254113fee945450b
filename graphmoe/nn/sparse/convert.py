from collections.abc import Callable

import torch
from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.nn.sparse.density import allocate_density
from graphmoe.nn.sparse.sparse_linear import SparseLinear

METHODS = ("magnitude", "random")


@torch.no_grad()
def to_sparse(
    module: nn.Module,
    density: float,
    *,
    method: str = "magnitude",
    distribution: str = "uniform",
    convert: Callable[[str, nn.Linear], bool] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the linear layers of any model by :class:`SparseLinear`, which keep some of their weights.

    Args:
        module: The model, changed in place; or one ``nn.Linear``.
        density: Edges, as a share of the weights of all replaced layers, in (0, 1].
        method: What is kept: the weights of largest ``magnitude`` in each layer, or ``random`` ones.
        distribution: See :func:`~graphmoe.nn.sparse.density.allocate_density`.
        convert: ``(name, layer) -> bool``: whether to replace a layer; by default all of exactly this class.
            Leave out those whose ``weight`` the model itself multiplies with.
        generator: Of the CPU, for ``random``; default: torch's own.

    Returns:
        The model; where it was itself a linear layer, what replaces it.

    Raises:
        ConfigError: An unknown method, a density outside (0, 1], nothing to replace, or a weight that
            several layers share.
    """
    if method not in METHODS:
        raise ConfigError("unknown method", "method", f"one of {', '.join(METHODS)}", method)
    found = {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and (convert is None or convert(name, layer))
    }
    if not found:
        raise ConfigError("no linear layer to replace", "module", "at least one", type(module).__name__)
    if len({id(layer.weight) for layer in found.values()}) < len(found):
        raise ConfigError("a weight is shared by several layers", "module", "a convert that leaves them out")
    shapes = [(layer.in_features, layer.out_features) for layer in found.values()]
    densities = allocate_density(shapes, density, distribution)
    for (name, layer), share in zip(found.items(), densities, strict=True):
        made = _sparse(layer, share, method, generator)
        if not name:
            return made
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, made)
    return module


def _sparse(layer: nn.Linear, density: float, method: str, generator: torch.Generator | None) -> SparseLinear:
    made = SparseLinear(
        layer.in_features, layer.out_features, density, bias=layer.bias is not None, generator=generator
    )
    made = made.to(layer.weight.device, layer.weight.dtype).train(layer.training)
    if method == "magnitude":
        order = layer.weight.abs().flatten().sort(descending=True, stable=True).indices
        place = order[: made.num_edges].sort().values
        made.source.copy_(place % layer.in_features)
        made.target.copy_(place.div(layer.in_features, rounding_mode="floor"))
    made.weight.copy_(layer.weight[made.target.long(), made.source.long()])
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made
