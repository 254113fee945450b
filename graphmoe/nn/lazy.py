"""Channels that the first input decides, as PyG's layers have them."""

import functools
import inspect
from collections.abc import Mapping
from math import lcm
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from graphmoe.errors import ConfigError

_SKELETON = 840  # any number that heads divide would do
_MARK = "_pending"


class _Pending(NamedTuple):
    """What a layer without channels needs to get them.

    Attributes:
        kind: Class whose constructor was called.
        arguments: Of its constructor, but for the channels.
        sizes: Attributes that follow from the channels, as (path of the submodule, name).
        place: Where a state shows them, as (key, dimension).
    """

    kind: type
    arguments: Mapping
    sizes: list[tuple[str, str]]
    place: tuple[str, int]


def lazy_channels(kind: type) -> type:
    """Class decorator: let a layer take ``-1`` for its channels, the first argument of its constructor.

    Such a layer has all its submodules, and parameters that are
    :class:`~torch.nn.parameter.UninitializedParameter`. With the first forward pass, or the first
    ``load_state_dict`` of a layer that has channels, it becomes what it would have been with the channels of
    that input (those of the targets, if it is a pair) or state. Parameters stay the same objects, so an
    optimiser may be made before; so do submodules, hooks, and what was set on them in the meantime. Where
    the constructor would have refused these channels, that forward pass does, and nothing has changed.

    Before it, layers can be copied, moved, cast, saved, and loaded into their like; ``reset_parameters`` does
    nothing, and buffers are empty. ``torch.compile`` and what shards or shares parameters want one forward
    pass first, as with any lazy module.

    Raises:
        ConfigError: From the constructor, for channels that are no integer of at least 1 and not ``-1``.
    """
    init, reset, state_dict = kind.__init__, kind.reset_parameters, kind.state_dict
    name = list(inspect.signature(init).parameters)[1]

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        channels = args[0] if args else kwargs.get(name, 1)  # what is missing Python itself says
        if not isinstance(channels, Integral) or (channels < 1 and channels != -1):
            raise ConfigError(
                "no number of channels", name, "at least 1, or -1: those of the input", channels
            )
        if channels != -1:
            return init(self, *args, **kwargs)
        arguments = inspect.signature(init).bind(self, *args, **kwargs).arguments
        arguments = {key: value for key, value in arguments.items() if key not in ("self", name)}
        arguments |= arguments.pop("kwargs", {})
        _postpone(self, kind, init, arguments)

    def reset_parameters(self) -> None:
        if _MARK not in vars(self):
            reset(self)

    def lazy_state_dict(self, *args, keep_vars: bool = False, **kwargs):
        # A parameter without a size cannot be detached.
        return state_dict(self, *args, keep_vars=keep_vars or _MARK in vars(self), **kwargs)

    kind.__init__ = __init__
    kind.reset_parameters = functools.wraps(reset)(reset_parameters)
    kind.state_dict = functools.wraps(state_dict)(lazy_state_dict)
    return kind


def _postpone(module: nn.Module, kind: type, init, arguments: Mapping) -> None:
    """Build ``module`` without channels: with some, and then without what follows from them."""
    channels = lcm(_SKELETON, *_heads(arguments))
    other = object.__new__(kind)
    with torch.device("meta"):
        init(module, channels, **arguments)
        init(other, 2 * channels, **arguments)
    sizes = []
    for (path, part), twin in zip(module.named_modules(), other.modules(), strict=True):
        for key, value in vars(part).items():
            if isinstance(value, int | float | tuple) and value != vars(twin)[key]:
                sizes.append((path, key))
                setattr(part, key, (-1,) if isinstance(value, tuple) else -1)
    place = next(
        (key, dim)
        for key, value in module.state_dict().items()
        for dim, size in enumerate(value.shape)
        if size == channels
    )
    for part in module.modules():
        for key, parameter in part.named_parameters(recurse=False):
            part._parameters[key] = UninitializedParameter(parameter.requires_grad, dtype=parameter.dtype)
        for key, buffer in part.named_buffers(recurse=False):
            part._buffers[key] = torch.empty(0, dtype=buffer.dtype)
    # Functions of the module they are called for: a copy of the layer must not prepare the original.
    module.register_forward_pre_hook(_before_forward, with_kwargs=True)
    module.register_load_state_dict_pre_hook(_before_load)
    setattr(module, _MARK, _Pending(kind, arguments, sizes, place))


def _heads(arguments: Mapping) -> list[int]:
    """Every number of heads among the arguments of a constructor, which channels must fit."""
    found = []
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            found += _heads(value)
        elif key.endswith("heads") and isinstance(value, Integral) and value > 0:
            found.append(int(value))
    return found


def _before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
    x = args[0] if args else kwargs.get("x")
    if isinstance(x, tuple | list):
        x = x[0] if x[1] is None else x[1]
    if isinstance(x, Tensor):  # forward itself complains about anything else
        _materialise(module, x.size(-1))


def _before_load(module: nn.Module, state_dict: Mapping, prefix: str, *_) -> None:
    key, dim = vars(module)[_MARK].place
    value = state_dict.get(prefix + key)
    if value is not None and not is_lazy(value) and value.dim() > dim:
        _materialise(module, value.size(dim))


def _materialise(module: nn.Module, channels: int) -> None:
    pending = vars(module)[_MARK]
    # The first pass may be one without gradients; what comes of it must learn all the same.
    with torch.inference_mode(False), torch.no_grad():
        with torch.device(next(p for p in module.parameters() if is_lazy(p)).data.device):
            twin = pending.kind(channels, **pending.arguments)
        for path, made in twin.named_modules():
            part = module.get_submodule(path)
            for key, parameter in made.named_parameters(recurse=False):
                part._parameters[key].materialize(parameter.shape)
                part._parameters[key].copy_(parameter)
            for key, buffer in made.named_buffers(recurse=False):
                part._buffers[key] = buffer.to(part._buffers[key])
        for path, key in pending.sizes:
            setattr(module.get_submodule(path), key, vars(twin.get_submodule(path))[key])
    _remove(module._forward_pre_hooks, _before_forward, module._forward_pre_hooks_with_kwargs)
    _remove(module._load_state_dict_pre_hooks, _before_load)
    delattr(module, _MARK)


def _remove(hooks: dict, hook, *flags: dict) -> None:
    for key, value in list(hooks.items()):
        if getattr(value, "hook", value) is hook:
            for table in (hooks, *flags):
                table.pop(key, None)
