"""Parameters of which each process holds a slice (FSDP2): whole tensors for files, slices out of files."""

from typing import NamedTuple

import torch
from torch import Tensor


class WholeState(NamedTuple):
    """A sharded model and its optimiser in whole tensors on the CPU.

    Attributes:
        weights: Parameters and buffers by name; tied ones are one tensor.
        slots: State of the optimiser by parameter, as ``optimizer.state``.
    """

    weights: dict[str, Tensor]
    slots: dict[Tensor, dict[str, object]]


def is_shard(tensor: object) -> bool:
    """Whether a tensor is split among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself or, if it is split, the whole of it; a collective then."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def share_like(tensor: Tensor, target: Tensor) -> Tensor:
    """What this process holds of a whole tensor, on the device and in the slices of ``target``."""
    if not is_shard(target):
        return tensor.to(target.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # No source rank: all processes have read the same file, so none has to send anything.
    return distribute_tensor(
        tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> WholeState | None:
    """Collect what a sharded model and its optimiser hold in all processes; ``None`` if nothing is sharded.

    A collective if something is. One tensor is whole at a time where nothing is kept; what is kept takes
    the memory of the whole model and of its optimiser, on the CPU.

    Args:
        model: The model.
        optimizer: Its optimiser.
        keep: Whether this process wants it, as the one that writes does; the others get empty tables.
    """
    if not any(is_shard(parameter) for parameter in model.parameters()):
        return None
    weights: dict[str, Tensor] = {}
    slots: dict[Tensor, dict[str, object]] = {}
    seen: dict[int, Tensor] = {}
    # keep_vars: detached tensors would no longer show that two names are one parameter.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            value = _collect(tensor, keep)
            seen[id(tensor)] = value
        weights[name] = seen[id(tensor)]
    for parameter in model.parameters():  # in the same order in all processes
        for slot, value in optimizer.state.get(parameter, {}).items():
            collected = _collect(value, keep) if isinstance(value, Tensor) else value
            slots.setdefault(parameter, {})[slot] = collected
    return WholeState(weights, slots) if keep else WholeState({}, {})


def _collect(tensor: Tensor, keep: bool) -> Tensor:
    full = whole(tensor.detach())
    return full.cpu() if keep else full.new_empty(0)
