"""Models of transformers that run in milliseconds, one of each way to route."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_FINE = {"moe_intermediate_size": 16, "head_dim": 8}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}
OPTIONS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, **_FINE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, **_FINE, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "head_dim": 4,
    },
    "deepseek_v3": {**_DEEPSEEK, "num_experts_per_tok": 3},
}
"""What each needs beside :data:`SIZES`."""


def tiny(name: str, **options) -> PreTrainedModel:
    """An untrained causal language model whose experts differ clearly; so do the biases of its routers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **OPTIONS.get(name, {}), **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() > 1:
                value.normal_(0, 0.2)
            elif key.endswith("e_score_correction_bias"):
                value.normal_(0, 0.05)
    return model
