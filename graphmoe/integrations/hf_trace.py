"""What the experts of a transformers MoE model are given in one forward pass: final indices and weights.

transformers hands every expert module that its decorator ``use_experts_implementation`` has marked the hidden
states, the experts that serve each token and their weights. By then groups, balancing biases, normalisation
and scaling have been applied, which are no part of the router's logits.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError

# What the decorator writes on every instance, whichever way its experts are computed.
_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")


class Served(NamedTuple):
    """Who serves the tokens of a pass in one MoE layer.

    Attributes:
        layer: Number of the decoder layer; layers without experts count.
        num_experts: ``E`` of this layer.
        index: Experts of each token, ``[N, k]`` int64; outside ``[0, E)`` where there is none.
        weight: Their weights, ``[N, k]`` float32.
    """

    layer: int
    num_experts: int
    index: Tensor
    weight: Tensor


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        served: One entry a MoE layer that ran, in the order of the layers.
        attention: Attention of each decoder layer, mean over heads, ``[B, T, S]`` (query, key; the keys
            of the pass come last), or ``None`` unless asked for.
    """

    served: list[Served]
    attention: list[Tensor] | None


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of stacked experts that transformers can dispatch, by its name in ``model``."""
    return {name: m for name, m in model.named_modules() if all(hasattr(m, mark) for mark in _MARKS)}


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, object], num_tokens: int, *, attention: bool = False) -> Pass:
    """Run ``model`` once as it stands and note whom its experts serve.

    Args:
        model: A transformers model; base models and those with a head.
        inputs: Arguments of its forward.
        num_tokens: Rows ``N`` that each layer has to route, ``B * T``.
        attention: Keep attention, too: the pass then uses the eager implementation, which holds ``[B, heads,
            T, S]`` of every layer at once.

    Raises:
        ConfigError: No expert was asked for anything, a layer ran more than once or over other rows
            than the tokens, or attention is wanted of a model whose layers do not all have one.
    """
    modules, calls, hooks = expert_modules(model), [], []
    inputs = {**_economies(model, inputs), **inputs}
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(_note(name, calls), with_kwargs=True))
        if attention:
            with eager_attention(model):
                outputs = model(**inputs, output_attentions=True)
        else:
            outputs = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    _check(calls, num_tokens, model)
    numbers = _layer_numbers([name for name, _, _ in calls])
    served = [
        Served(number, modules[name].num_experts, index, weight)
        for number, (name, index, weight) in zip(numbers, calls, strict=True)
    ]
    order = sorted(range(len(served)), key=numbers.__getitem__)
    return Pass([served[place] for place in order], _attention(model, outputs) if attention else None)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Within the context ``model`` and its parts compute attention so that the weights can be had."""
    config = model.config
    before = {key: getattr(config, key)._attn_implementation for key in config.sub_configs}
    before[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _note(name: str, calls: list[tuple[str, Tensor, Tensor]]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Architectures name these arguments differently, but all take them in this order.
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        _, _, index, weight = list(given.arguments.values())[:4]
        # Copies: an implementation may write into what it was given.
        calls.append(
            (name, index.to("cpu", torch.int64, copy=True), weight.to("cpu", torch.float32, copy=True))
        )

    return hook


def _economies(model: nn.Module, inputs: Mapping[str, object]) -> dict[str, object]:
    """Arguments that spare what is of no use here: the cache, and the logits of all tokens but one."""
    known = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    cached = inputs.keys() & {"cache", "past_key_values"}
    spared: dict[str, object] = (
        {"use_cache": False} if not cached and ("use_cache" in known or takes_any) else {}
    )
    return spared | ({"logits_to_keep": 1} if "logits_to_keep" in known and "labels" not in inputs else {})


def _check(calls: list[tuple[str, Tensor, Tensor]], num_tokens: int, model: nn.Module) -> None:
    if not calls:
        what = "no expert was asked for anything: their layers were skipped or replaced by other kernels"
        raise ConfigError(what, "model", "a pass through MoE layers", type(model).__name__)
    name, times = Counter(name for name, _, _ in calls).most_common(1)[0]
    if times > 1:
        raise ConfigError("a layer that runs several times in one pass cannot be traced", name, 1, times)
    for name, index, weight in calls:
        if index.dim() != 2 or index.size(0) != num_tokens or index.shape != weight.shape:
            got = [tuple(index.shape), tuple(weight.shape)]
            raise ConfigError(
                "experts serve something else than tokens", name, f"[{num_tokens}, k] twice", got
            )


def _layer_numbers(names: list[str]) -> list[int]:
    """Number of the decoder layer of each expert module; their order where that does not tell them apart."""
    digits = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    numbers = [parts[0] if parts else None for parts in digits]
    distinct = None not in numbers and len(set(numbers)) == len(numbers)
    return numbers if distinct else list(range(len(names)))


def _attention(model: nn.Module, outputs: object) -> list[Tensor]:
    layers = model.config.get_text_config().num_hidden_layers
    weights = getattr(outputs, "attentions", None) or ()
    fits = all(
        isinstance(item, Tensor) and item.dim() == 4 and item.size(2) <= item.size(3) for item in weights
    )
    if len(weights) != layers or not fits or len({item.shape[2:] for item in weights}) > 1:
        got = [None if item is None else tuple(item.shape) for item in weights]
        what = "attention cannot be traced: not every layer has weights from tokens to tokens"
        raise ConfigError(what, "attention", f"[B, heads, T, S] of each of {layers} layers", got)
    return [item.mean(dim=1, dtype=torch.float32).cpu() for item in weights]
