"""Which weights of a model exist: masks that only shrink, to exact counts."""

import math
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphmoe.checkpoint import read_tensors, write_records
from graphmoe.errors import ConfigError, GraphMoEError

SCOPES = ("layer", "global")
"""Whether magnitudes are compared within a layer, or among all layers."""


def prunable_weights(model: nn.Module, *, exclude: Collection[str] = ()) -> list[str]:
    """Names of the weights that pruning may remove: those of linear maps and convolutions.

    Biases, norms and embeddings stay, and so does a weight that a linear map shares with an embedding. A
    weight that several layers share is named once.

    Args:
        model: The model.
        exclude: Names of modules that stay as they are, with all that is inside, such as ``("classifier",)``.

    Raises:
        ConfigError: No module has such a name, or nothing is left.
    """
    modules = dict(model.named_modules())
    for name in exclude:
        if name not in modules:
            raise ConfigError("no such module", "exclude", f"some of {', '.join(modules)}", name)
    seen = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    names = []
    for name, module in modules.items():
        outside = not any(name == other or name.startswith(f"{other}.") for other in exclude)
        maps = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if outside and maps and id(module.weight) not in seen:
            seen.add(id(module.weight))
            names.append(f"{name}.weight" if name else "weight")
    if not names:
        raise ConfigError("nothing to prune", "model", "a linear map or a convolution", type(model).__name__)
    return names


class Masks(Mapping[str, Tensor]):
    """Which entries of some parameters exist; what :meth:`prune` returns is a part of what was there.

    A mapping from names of parameters to masks of their shapes, bool on the CPU, which never change.

    Args:
        masks: The masks by name; every one keeps at least one weight.

    Raises:
        ConfigError: No mask, one that is not of bools, or one that keeps nothing.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        if not masks:
            raise ConfigError("no mask", "masks", "at least one")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ConfigError("a mask is not of bools", name, torch.bool, mask.dtype)
            if not mask.any():
                raise ConfigError("a layer has no weight", name, "at least 1", 0)
        self._masks = {name: mask.detach().cpu() for name, mask in masks.items()}

    @classmethod
    def full(cls, model: nn.Module, names: Collection[str] | None = None) -> "Masks":
        """Masks of a dense model, to begin with.

        Args:
            model: The model.
            names: Parameters that may lose entries; by default :func:`prunable_weights`.

        Raises:
            ConfigError: The model has no such parameter.
        """
        names = prunable_weights(model) if names is None else names
        found = _parameters(model, names)
        return cls({name: torch.ones(found[name].shape, dtype=torch.bool) for name in names})

    @classmethod
    def load(cls, path: str | PathLike) -> "Masks":
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: There is no such file, or it is malformed.
        """
        return cls(read_tensors(Path(path))[0])

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file, atomically."""
        write_records(Path(path), self._masks, {})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.remaining:,} of {self.total:,} weights, {len(self)} layers)"

    @property
    def counts(self) -> dict[str, int]:
        """Weights that exist, by name."""
        return {name: int(mask.sum()) for name, mask in self.items()}

    @property
    def remaining(self) -> int:
        """Weights that exist."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Weights of the dense model."""
        return sum(mask.numel() for mask in self.values())

    def prune(
        self,
        weights: nn.Module | Mapping[str, Tensor],
        fraction: float,
        *,
        scope: str = "layer",
        fractions: Mapping[str, float] | None = None,
    ) -> "Masks":
        """Remove the weights of least magnitude
        (`Frankle & Carbin 2019 <https://arxiv.org/abs/1803.03635>`_).

        Of ``n`` weights ``max(1, round((1 - fraction) n))`` stay; ``global`` counts all layers together, of
        which each keeps its largest weight. Among equal magnitudes the first ones stay, in the order of
        layers and places.

        Args:
            weights: The trained model, or its parameters by name.
            fraction: Share of the weights that exist, which is removed, in [0, 1).
            scope: ``layer``: this share of every layer; ``global``: of all layers together.
            fractions: Shares of some layers, which are pruned by themselves under either scope.

        Returns:
            New masks; these stay.

        Raises:
            ConfigError: A share outside [0, 1), an unknown scope or name, or weights of another shape.
            GraphMoEError: Weights that are not finite.
        """
        fractions = dict(fractions or {})
        for value in (fraction, *fractions.values()):
            if not 0 <= value < 1:
                raise ConfigError("no share of the weights", "fraction", "from 0 on, below 1", value)
        if scope not in SCOPES:
            raise ConfigError("unknown scope", "scope", f"one of {', '.join(SCOPES)}", scope)
        for name in fractions:
            if name not in self:
                raise ConfigError("no such mask", "fractions", f"some of {', '.join(self)}", name)
        values = self._fitting(weights)
        together = [name for name in self if name not in fractions]
        groups = [([name], share) for name, share in fractions.items()]
        groups += [(together, fraction)] if scope == "global" else [([name], fraction) for name in together]
        kept: dict[str, Tensor] = {}
        for names, share in groups:
            kept |= self._largest(names, values, share) if names else {}
        return Masks({name: kept[name] for name in self})

    def random(self, seed: int) -> "Masks":
        """Masks with as many weights in every layer, at random places; with the same seed those of fewer
        weights are a part of those of more."""
        masks = {}
        for index, (name, mask) in enumerate(self.items()):
            numbers = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(numbers[0]) % 2**63)
            order = torch.randperm(mask.numel(), generator=generator)
            masks[name] = _at(order[: int(mask.sum())], mask.numel()).view(mask.shape)
        return Masks(masks)

    def within(self, other: "Masks") -> bool:
        """Whether every weight that exists here does so in ``other``, too."""
        return all(name in other and not (mask & ~other[name]).any() for name, mask in self.items())

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the masks are about.

        Raises:
            ConfigError: The model has no such parameter, or one of another shape.
        """
        return self._fitting(model)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set what does not exist to 0; raises as :meth:`parameters`."""
        for name, parameter in self.parameters(model).items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    @torch.no_grad()
    def outside(self, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
        """Audit: how many entries are not 0 though they do not exist, by name, in parameters and in what an
        optimiser keeps for them. All counts are 0 where the masks were applied; raises as
        :meth:`parameters`."""
        counts = {}
        for name, parameter in self.parameters(model).items():
            pruned = ~self[name].to(parameter.device)
            kept = {} if optimizer is None else optimizer.state.get(parameter, {})
            tensors = [parameter, *entries_of(kept, parameter)]
            counts[name] = sum(int(torch.count_nonzero(tensor[pruned])) for tensor in tensors)
        return counts

    def _fitting(self, weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = _parameters(weights, self)
        for name, mask in self.items():
            if found[name].shape != mask.shape:
                expected, got = list(found[name].shape), list(mask.shape)
                raise ConfigError("a mask of another shape than its weights", name, expected, got)
        return found

    def _largest(self, names: list[str], values: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        """Masks of some layers, which share what is left of the weights of all of them."""
        sizes = []
        for name in names:
            size = values[name].detach().cpu().abs().flatten()
            if not size.isfinite().all():
                raise GraphMoEError("weights that are not finite cannot be compared", name)
            size = size.masked_fill(~self[name].flatten(), -1)
            size[size.argmax()] = math.inf  # no layer becomes empty
            sizes.append(size)
        alive = sum(int(self[name].sum()) for name in names)
        count = max(len(names), round((1 - fraction) * alive))
        every = torch.cat(sizes)
        kept = _at(every.sort(descending=True, stable=True).indices[:count], len(every))
        parts = kept.split([len(size) for size in sizes])
        return {name: part.view(self[name].shape) for name, part in zip(names, parts, strict=True)}


def entries_of(state: Mapping[str, object], parameter: Tensor) -> list[Tensor]:
    """What an optimiser keeps for each entry of a parameter, such as moments; not its step counter."""
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]


def _parameters(weights: nn.Module | Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    known = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
    for name in names:
        if name not in known:
            raise ConfigError("no such parameter", "masks", f"some of {', '.join(known)}", name)
    return {name: known[name] for name in names}


def _at(places: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[places] = True
    return mask
