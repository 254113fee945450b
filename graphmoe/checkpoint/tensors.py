"""The tensors of a model and of its optimiser, as two safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graphmoe.checkpoint.shards import is_shard, share_like
from graphmoe.errors import CheckpointError
from graphmoe.files import parse_json
from graphmoe.run_record import read_tensors, without_sharing

# Optimiser slots that are smaller than their parameter.
_FACTORED = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")


def write_model(path: Path, model: torch.nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights of a model, and beside them what its ``save_pretrained`` adds.

    Args:
        path: The file of the weights.
        model: The model.
        weights: What stands for the weights of a model that holds slices of them only.
    """
    if hasattr(model, "save_pretrained"):
        whole = None if weights is None else dict(weights)
        # Under the names that the model has now, not those of older files of its kind: load_model reads them.
        model.save_pretrained(path.parent, state_dict=whole, save_original_format=False)
        return
    unique: dict[tuple, str] = {}
    tensors = _model_tensors(model) if weights is None else weights
    for name, tensor in tensors.items():
        unique.setdefault(_place(name, tensor), name)
    _write_tensors(path, {name: tensors[name] for name in unique.values()}, {"format": "pt"})


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Copy the weights of a file into a model; weights that do not fit change nothing.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, or has another shape or dtype.
    """
    weights, _ = read_tensors(path)
    targets = _model_tensors(model)
    _check_weights(weights, targets, path)
    with torch.no_grad():
        for name, tensor in weights.items():
            targets[name].copy_(share_like(tensor, targets[name]))


def write_optimizer(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    slots: Mapping[Tensor, Mapping[str, Any]] | None = None,
) -> None:
    """Write an optimiser's tensors as ``{parameter}/{slot}``; plain numbers go into the metadata.

    Args:
        path: The file.
        model: Names the parameters.
        optimizer: The optimiser.
        slots: What stands for the ``state`` of an optimiser that holds slices of it only.

    Raises:
        CheckpointError: If there is state of no parameter of the model, or of another type.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for parameter, values in (optimizer.state if slots is None else slots).items():
        if parameter not in names:
            what = "optimizer holds state of a tensor that is no parameter of the model"
            raise CheckpointError(what, path.name)
        for slot, value in values.items():
            name = f"{names[parameter]}/{slot}"
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, int | float):
                numbers[name] = value
            elif value is not None:
                what = "optimizer state is neither a tensor nor a number"
                raise CheckpointError(what, name, got=type(value))
    _write_tensors(path, tensors, {"optimizer": _kind(optimizer), "numbers": json.dumps(numbers)})


def read_optimizer(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[Tensor, dict[str, Any]]:
    """Read the state of an optimiser, on the devices where it belongs; the optimiser stays as it is.

    Returns:
        What ``optimizer.state`` was.

    Raises:
        CheckpointError: If it is of another optimiser, parameter or shape.
    """
    tensors, metadata = read_tensors(path)
    kind = metadata.get("optimizer")
    if kind != _kind(optimizer):
        raise CheckpointError("state is of another optimizer", path, _kind(optimizer), kind)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in groups}
    numbers = parse_json(metadata.get("numbers", "{}").encode(), path)
    state: dict[Tensor, dict[str, Any]] = {}
    for key, value in (tensors | numbers).items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"optimizer state {key} belongs to no parameter of the optimizer", path)
        parameter = parameters[name]
        if isinstance(value, Tensor):
            if value.dim() and slot not in _FACTORED:
                _check_shape(value, parameter, f"optimizer state {key}", path)
            if value.shape == parameter.shape and is_shard(parameter):
                value = share_like(value, parameter)
            else:
                value = value.to(_slot_device(slot, parameter, groups[parameter]), copy=True)
        state.setdefault(parameter, {})[slot] = value
    return state


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(without_sharing(tensors), path, metadata)


def _model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    # keep_vars: slices of two parameters can both be empty; that names are one parameter shows only there.
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError("model state is not a tensor", name, got=type(tensor))
    return dict(tensors)


def _place(name: str, tensor: Tensor) -> tuple:
    """What two tensors have in common when they are the same memory, as tied weights are."""
    if is_shard(tensor):
        return (id(tensor),)
    if tensor.numel() == 0:
        return (name,)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _check_weights(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in weights.items():
        if name not in targets:
            raise CheckpointError(f"tensor {name} is not in the model", path)
        _check_shape(tensor, targets[name], f"tensor {name}", path)
        if tensor.dtype != targets[name].dtype:
            what = f"tensor {name} has another dtype"
            raise CheckpointError(what, path, targets[name].dtype, str(tensor.dtype))
    given = {_place(name, targets[name]) for name in weights}
    for name, target in targets.items():
        if _place(name, target) not in given:
            raise CheckpointError(f"tensor {name} is missing", path)


def _check_shape(tensor: Tensor, target: Tensor, name: str, path: Path) -> None:
    if tensor.shape != target.shape:
        raise CheckpointError(f"{name} has another shape", path, list(target.shape), list(tensor.shape))


def _slot_device(slot: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Torch keeps step counts on the CPU unless its kernel reads them itself."""
    if slot == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device


def _kind(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps it
