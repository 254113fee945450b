"""Sparse upcycling: a trained dense model of transformers becomes the start of a mixture of experts."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from graphmoe.errors import ConfigError
from graphmoe.integrations.dense_families import FAMILIES, Copies, Family, Weights

# What a configuration says of a class or of where it came from, not of the network.
_NOT_CARRIED = ("architectures", "dtype", "model_type", "transformers_version", "_name_or_path")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def upcycle(
    dense_model: PreTrainedModel,
    num_experts: int,
    num_experts_per_tok: int = 2,
    *,
    layers: Iterable[int] | None = None,
    router_std: float | None = None,
    noise_std: float = 0.0,
    seed: int = 0,
    router_aux_loss_coef: float | None = None,
) -> PreTrainedModel:
    r"""A mixture of experts that computes what a dense model computes, and can learn more.

    Sparse Upcycling (`Komatsuzaki et al. 2022 <https://arxiv.org/abs/2212.05055>`_): every expert starts as a
    copy of the feed-forward network of its layer, the router as a small random matrix. The weights of a
    token's experts sum to 1, so that at the start

    .. math::
        \sum_{e \in \mathrm{top}_k(x)} w_e(x)\, \mathrm{MLP}(x) = \mathrm{MLP}(x)

    whatever the router says: outputs are those of the dense model, beyond rounding (routers of transformers
    weigh in float32). Experts part as soon as they are given different tokens.

    =========================  =======================  =========================================
    dense                      sparse                   cannot be expressed
    =========================  =======================  =========================================
    ``LlamaForCausalLM``       ``MixtralForCausalLM``   ``attention_bias``, ``mlp_bias``
    ``MistralForCausalLM``     ``MixtralForCausalLM``
    ``Qwen2ForCausalLM``       ``Qwen2MoeForCausalLM``
    ``Qwen3ForCausalLM``       ``Qwen3MoeForCausalLM``  a sliding window in some layers only
    ``GraphMoEForCausalLM``    the same
    =========================  =======================  =========================================

    ``Qwen2MoeForCausalLM`` has an expert that serves all tokens, through a gate ``sigmoid(v x)``. It is a
    copy of the feed-forward network, too, with ``v = 0``, and the down projections of the routed experts are
    halved, so that each side gives one half. A token passes through ``k + 1`` copies there.

    The result is a plain model on the device and in the type of the dense one, with which it shares no
    memory. It trains, saves and loads like any other, and those of transformers run faster with
    ``experts_implementation="graphmoe"``: see :func:`graphmoe.integrations.hf.register`.

    Args:
        dense_model: A trained model of a class above; ``GraphMoEForCausalLM`` with ``num_experts=1``.
        num_experts: Experts ``E`` of every sparse layer, at least 2.
        num_experts_per_tok: Experts ``k`` of a token, ``1 <= k <= E``.
        layers: Layers to make sparse, counted from 0; the others stay dense (Qwen only). ``None``: all.
        router_std: Standard deviation of the router's weights. ``None``: ``initializer_range`` of the model.
        noise_std: Standard deviation of Gaussian noise on the weights of every expert, as a fraction of the
            root mean square of the matrix. It parts experts at once, and the outputs from those of the dense
            model.
        seed: Of the router and of the noise; the same on every device.
        router_aux_loss_coef: Weight of the load-balancing loss, which is then part of the loss. ``None``: the
            default of the sparse class; in transformers the loss is left out.

    Returns:
        The sparse model, in the mode (training or not) of the dense one.

    Raises:
        ConfigError: A class that is not in the table, a model that already has experts, weights that are
            quantised or of several types or devices, an option the sparse class cannot express, or sizes
            out of range.
    """
    family, dense = _family(dense_model), dense_model.config
    router_std = dense.initializer_range if router_std is None else router_std
    _check_sizes(num_experts, num_experts_per_tok, router_std, noise_std)
    sparse_layers = _sparse_layers(dense, layers, family)
    dtype, device = _dtype_and_device(dense_model)
    values = _carried(dense, family)
    dense_layers = sorted(set(range(dense.num_hidden_layers)) - set(sparse_layers))
    values |= family.configure(values, num_experts, num_experts_per_tok, dense_layers)
    if router_aux_loss_coef is not None:
        values |= {"router_aux_loss_coef": router_aux_loss_coef}
        values |= {} if family.sparse is None else {"output_router_logits": True}
    sparse = family.sparse or type(dense_model)
    config = sparse.config_class(**values)
    config._attn_implementation = dense._attn_implementation
    with no_init_weights(), torch.device(device):
        model = sparse._from_config(config, dtype=dtype)
    model.tie_weights()  # left out together with the initial weights
    make = Copies(num_experts, router_std, noise_std, torch.Generator().manual_seed(seed))
    _fill(model, dense_model.state_dict(), sparse_layers, family, make)
    model.generation_config = copy.deepcopy(dense_model.generation_config)
    return model.train(dense_model.training)


def _family(model: PreTrainedModel) -> Family:
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    for name in _EXPERTS:
        number = getattr(config, name, None) or 0
        if number > (family is not None and family.sparse is None):
            raise ConfigError(
                "the model has experts already", "dense_model", "a dense model", f"{name}={number}"
            )
    if family is None or type(model).__name__ != family.dense:
        known = ", ".join(family.dense for family in FAMILIES.values())
        raise ConfigError("cannot be upcycled", "dense_model", f"one of {known}", type(model).__name__)
    return family


def _check_sizes(num_experts: int, k: int, router_std: float, noise_std: float) -> None:
    if num_experts < 2:
        raise ConfigError("too few", "num_experts", "at least 2", num_experts)
    if not 1 <= k <= num_experts:
        expected = f"1 <= k <= {num_experts}"
        raise ConfigError("k must not exceed the number of experts", "num_experts_per_tok", expected, k)
    if not 0 < router_std < float("inf"):
        raise ConfigError(
            "equal scores for all experts leave nothing to choose", "router_std", "> 0", router_std
        )
    if not 0 <= noise_std < float("inf"):
        raise ConfigError("noise needs a size", "noise_std", ">= 0", noise_std)


def _sparse_layers(config: PreTrainedConfig, layers: Iterable[int] | None, family: Family) -> list[int]:
    count = config.num_hidden_layers
    chosen = list(range(count)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ConfigError("no such layers", "layers", f"some of 0 to {count - 1}", chosen)
    if len(chosen) < count and not family.some_layers:
        sparse = family.dense if family.sparse is None else family.sparse.__name__
        raise ConfigError(f"{sparse} has experts in every layer", "layers", f"None, or all {count}", chosen)
    return chosen


def _dtype_and_device(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError("experts cannot be copied from quantised weights", "dense_model", "plain weights")
    kinds = {(weight.dtype, weight.device) for weight in model.parameters()}
    dtype, device = next(iter(kinds))
    if len(kinds) > 1 or not dtype.is_floating_point or device.type == "meta":
        expected, got = "weights of one floating-point type on one device", sorted(map(str, kinds))
        raise ConfigError("weights cannot be copied", "dense_model", expected, got)
    return dtype, device


def _carried(config: PreTrainedConfig, family: Family) -> dict:
    """The fields of the dense configuration that the sparse one shares with it."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_CARRIED}
    for name, plain in family.refused.items():
        if values.pop(name, plain) != plain:
            what = f"{family.sparse.__name__} has no such option"
            raise ConfigError(what, name, plain, getattr(config, name))
    return values


@torch.no_grad()
def _fill(model: nn.Module, state: Weights, sparse_layers: list[int], family: Family, make: Copies) -> None:
    """Copy the weights ``state`` of the dense model into the sparse one, layer by layer."""
    missing = set()
    for layer in sparse_layers:
        prefix = f"model.layers.{layer}.{family.branch}."
        mlp = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        target = model.get_submodule(prefix[:-1])
        target.load_state_dict(family.expand(mlp, make))
        missing |= {prefix + name for name in target.state_dict()}
    left = model.load_state_dict(state, strict=False)
    if left.unexpected_keys or set(left.missing_keys) != missing:
        got = [*left.unexpected_keys, *sorted(set(left.missing_keys) ^ missing)]
        raise ConfigError(
            "weights with no place in the sparse class", "dense_model", "those of its class", got
        )
