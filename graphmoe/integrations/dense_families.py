"""The dense models that can be upcycled: what becomes of their configurations and feed-forward networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from graphmoe.errors import ConfigError


@dataclass
class Copies:
    """Makes what an expert layer needs that a dense one lacks."""

    num_experts: int
    router_std: float
    noise_std: float
    generator: torch.Generator

    def experts(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """``scale`` times ``weight [O, I]`` for every expert, ``[E, O, I]``, plus the noise."""
        copies = (scale * weight).expand(self.num_experts, *weight.shape)
        if not self.noise_std:
            return copies
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = self.noise_std * copies[0].to(dtype).square().mean().sqrt()
        return torch.stack([one.to(dtype) + size * self._normal(weight, *one.shape) for one in copies])

    def router(self, like: Tensor) -> Tensor:
        """``[E, D]`` of the device and number of channels of ``like [*, D]``."""
        return self.router_std * self._normal(like, self.num_experts, like.size(1))

    def _normal(self, like: Tensor, *shape: int) -> Tensor:
        # Drawn on the CPU, where a seed means the same numbers whatever the device of the model.
        return torch.randn(shape, generator=self.generator).to(like.device)


Weights = dict[str, Tensor]


def _transformers_experts(mlp: Weights, make: Copies, scale: float = 1.0) -> Weights:
    gate, up, down = (mlp[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {
        "gate.weight": make.router(gate),
        "experts.gate_up_proj": make.experts(torch.cat([gate, up])),
        "experts.down_proj": make.experts(down, scale),
    }


def _experts_and_shared(mlp: Weights, make: Copies) -> Weights:
    shared = {f"shared_expert.{name}": weight for name, weight in mlp.items()}
    gate = torch.zeros_like(mlp["gate_proj.weight"][:1])  # [1, D], and sigmoid(0) is one half
    return _transformers_experts(mlp, make, 0.5) | shared | {"shared_expert_gate.weight": gate}


def _own_experts(mlp: Weights, make: Copies) -> Weights:
    first, second = mlp["gate_up_proj.weight"], mlp["down_proj.weight"]
    return {
        "router.weight": make.router(first),
        "experts.gate_up_proj": make.experts(first),
        "experts.down_proj": make.experts(second),
    }


def _mixtral_config(values: dict, num_experts: int, k: int, dense_layers: list[int]) -> dict:
    return {"num_local_experts": num_experts, "num_experts_per_tok": k}


def _qwen3_config(values: dict, num_experts: int, k: int, dense_layers: list[int]) -> dict:
    kinds = set(values.pop("layer_types"))
    if len(kinds) > 1:
        what = "Qwen3MoeForCausalLM has one kind of attention in all layers"
        raise ConfigError(
            what, "layer_types", "full_attention or sliding_attention throughout", sorted(kinds)
        )
    values.pop("max_window_layers")
    values["use_sliding_window"] = kinds == {"sliding_attention"}
    return _qwen_config(values, num_experts, k, dense_layers)


def _qwen2_config(values: dict, num_experts: int, k: int, dense_layers: list[int]) -> dict:
    shared = {"shared_expert_intermediate_size": values["intermediate_size"], "qkv_bias": True}
    return shared | _qwen_config(values, num_experts, k, dense_layers)


def _qwen_config(values: dict, num_experts: int, k: int, dense_layers: list[int]) -> dict:
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": values["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
    }


def _own_config(values: dict, num_experts: int, k: int, dense_layers: list[int]) -> dict:
    # A dense model has these fields, too, but does not look at them.
    weights = {
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "fusion": "sum",
        "fusion_projection": False,
    }
    return {"num_experts": num_experts, "num_experts_per_tok": k, **weights}


@dataclass(frozen=True)
class Family:
    """How the models of one dense class become those of a sparse class."""

    dense: str
    sparse: type[PreTrainedModel] | None  # None: the same class
    configure: Callable[[dict, int, int, list[int]], dict]
    """Fields of the sparse configuration that differ; takes those out that it has no place for."""
    expand: Callable[[Weights, Copies], Weights]
    refused: Mapping[str, object]
    """Fields that the sparse class lacks, and the value at which it needs none."""
    branch: str = "mlp"
    some_layers: bool = False


FAMILIES = {
    "llama": Family(
        LlamaForCausalLM.__name__,
        MixtralForCausalLM,
        _mixtral_config,
        _transformers_experts,
        {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        MistralForCausalLM.__name__, MixtralForCausalLM, _mixtral_config, _transformers_experts, {}
    ),
    "qwen2": Family(
        Qwen2ForCausalLM.__name__,
        Qwen2MoeForCausalLM,
        _qwen2_config,
        _experts_and_shared,
        {},
        some_layers=True,
    ),
    "qwen3": Family(
        Qwen3ForCausalLM.__name__,
        Qwen3MoeForCausalLM,
        _qwen3_config,
        _transformers_experts,
        {},
        some_layers=True,
    ),
    "graphmoe": Family("GraphMoEForCausalLM", None, _own_config, _own_experts, {}, branch="feed_forward"),
}
