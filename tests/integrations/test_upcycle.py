"""Sparse upcycling: a mixture that starts as the dense model it was made of, and can leave it."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.integrations import hf
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM

hf.register()

COMMON = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
DENSE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "llama_scaled": lambda: LlamaForCausalLM(
        LlamaConfig(
            **COMMON, rope_parameters=LLAMA3, head_dim=16, rms_norm_eps=1e-3, tie_word_embeddings=True
        )
    ),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen2_some_windows": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **WINDOW, max_window_layers=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, attention_bias=True)),
    "qwen3_window": lambda: Qwen3ForCausalLM(
        Qwen3Config(**COMMON, **WINDOW, max_window_layers=0, head_dim=8, rope_parameters=YARN)
    ),
    "graphmoe": lambda: GraphMoEForCausalLM(
        GraphMoEConfig(**COMMON, num_experts=1, num_experts_per_tok=1, post_norm=0.5)
    ),
    "graphmoe_gelu": lambda: GraphMoEForCausalLM(
        GraphMoEConfig(
            **COMMON, num_experts=1, num_experts_per_tok=1, hidden_act="gelu", router_temperature=2.0
        )
    ),
}
IDS = torch.arange(34).mul(7).remainder(53).view(2, 17)


def dense(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = DENSE[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases, which start at 1 and 0
                weight.add_(0.2 * torch.randn_like(weight))
    return model.to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def reload(path: Path, **options) -> PreTrainedModel:
    """A saved model in memory of its own: weights mapped from a file may lie at odd addresses, where a matrix
    product rounds otherwise."""
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(path, **options))


@pytest.mark.parametrize("name", DENSE)
def test_starts_as_the_dense_model(name: str):
    model = dense(name)
    before = copy.deepcopy(model.state_dict())
    sparse = graphmoe.upcycle(model, 5, 3)
    assert apart(logits(sparse), logits(model)) <= 1e-6
    # With padding, and token by token from a cache, too.
    present = torch.ones_like(IDS)
    present[0, :6] = 0
    options = {"attention_mask": present, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(IDS, **options), model.generate(IDS, **options))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    mine = {weight.data_ptr() for weight in model.parameters()}
    assert not mine & {weight.data_ptr() for weight in sparse.parameters()}
    assert sparse.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("name", ["llama_scaled", "qwen2", "graphmoe"])
def test_in_double_precision_only_the_routers_weights_are_rounded(name: str):
    model = dense(name, torch.float64)
    sparse = graphmoe.upcycle(model, 4)
    assert sparse.dtype == torch.float64
    if name != "graphmoe":
        sparse.set_experts_implementation("graphmoe")
    assert apart(logits(sparse), logits(model)) <= (1e-14 if name == "graphmoe" else 2e-7)


def test_in_half_precision():
    model = dense("qwen3", torch.bfloat16)
    sparse = graphmoe.upcycle(model, 4)
    assert {weight.dtype for weight in sparse.parameters()} == {torch.bfloat16}
    assert apart(logits(sparse).float(), logits(model).float()) <= 2e-2


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2", "qwen3_window", "graphmoe"])
def test_experts_are_copies_and_routers_differ(name: str):
    model = dense(name)
    sparse = graphmoe.upcycle(model, 4, seed=3)
    mlps = [layer.feed_forward if name == "graphmoe" else layer.mlp for layer in model.model.layers]
    mixtures = [layer.feed_forward if name == "graphmoe" else layer.mlp for layer in sparse.model.layers]
    routers = []
    for mlp, mixture in zip(mlps, mixtures, strict=True):
        share = 0.5 if name == "qwen2" else 1.0  # the other half is that of the shared expert
        assert torch.equal(mixture.experts.down_proj, share * mlp.down_proj.weight.expand(4, 32, 40))
        if name == "graphmoe":
            first = mlp.gate_up_proj.weight
        else:
            first = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(mixture.experts.gate_up_proj, first.expand(4, 80, 32))
        routers.append((mixture.router if name == "graphmoe" else mixture.gate).weight)
    spread = torch.stack(list(routers))
    assert 0.08 < spread.std() < 0.12  # initializer_range
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(routers, 2))


def test_the_seed_is_that_of_routers_and_noise():
    model = dense("llama")
    first, same, other = (
        graphmoe.upcycle(model, 3, noise_std=0.1, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    for key, value in first.items():
        drawn = "mlp" in key
        assert torch.equal(value, same[key])
        assert torch.equal(value, other[key]) != drawn, key


def test_noise_parts_experts_by_its_share_of_their_size():
    model = dense("qwen2", torch.float64)
    sparse = graphmoe.upcycle(model, 8, noise_std=0.25, router_std=0.5)
    mixture, mlp = sparse.model.layers[1].mlp, model.model.layers[1].mlp
    assert 0.45 < mixture.gate.weight.std() < 0.55
    off = mixture.experts.down_proj - 0.5 * mlp.down_proj.weight
    assert 0.23 < (off.square().mean() / (0.5 * mlp.down_proj.weight).square().mean()).sqrt() < 0.27
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(off.unbind(), 2))
    assert torch.equal(mixture.shared_expert.down_proj.weight, mlp.down_proj.weight)
    sparse.set_experts_implementation("graphmoe")
    assert apart(logits(sparse), logits(model)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "graphmoe"])
def test_experts_part_in_training_and_everything_learns(name: str):
    model = dense(name)
    sparse = graphmoe.upcycle(model.train(), 4, router_aux_loss_coef=0.01)
    assert sparse.training
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    outputs = sparse(input_ids=IDS, labels=IDS)
    outputs.loss.backward()
    idle = [n for n, p in sparse.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
    first = sparse.model.layers[0]
    experts = (first.feed_forward if name == "graphmoe" else first.mlp).experts
    assert torch.equal(experts.down_proj[0], experts.down_proj[1])
    optimizer.step()
    for a, b in itertools.combinations(range(4), 2):
        assert not torch.equal(experts.down_proj[a], experts.down_proj[b])
        assert not torch.equal(experts.gate_up_proj[a], experts.gate_up_proj[b])
    # While experts are equal, the loss of the text is the same whatever routers do; theirs is not.
    with torch.no_grad():
        plain = graphmoe.upcycle(model, 4)(input_ids=IDS, labels=IDS)
    if name == "graphmoe":
        assert outputs.aux_losses["balance"] >= 0.9
    else:
        assert outputs.aux_loss >= 0.9 and plain.aux_loss is None
        torch.testing.assert_close(outputs.loss, plain.loss + 0.01 * outputs.aux_loss)


def test_the_balancing_loss_is_off_as_in_transformers_unless_it_has_a_weight():
    model = dense("qwen3")
    assert graphmoe.upcycle(model, 4).config.output_router_logits is False
    config = graphmoe.upcycle(model, 4, router_aux_loss_coef=0.02).config
    assert config.output_router_logits is True and config.router_aux_loss_coef == 0.02


@pytest.mark.parametrize(
    "name", ["llama_scaled", "mistral_window", "qwen2_some_windows", "qwen3_window", "graphmoe"]
)
def test_saves_and_loads_as_any_model(name: str, tmp_path):
    sparse = graphmoe.upcycle(dense(name), 4)
    sparse.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert type(again) is type(sparse)
    assert torch.equal(logits(again), logits(sparse))
    tied = sparse.config.tie_word_embeddings
    for model in (sparse, again):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    if name != "graphmoe":
        fast = reload(tmp_path, experts_implementation="graphmoe")
        assert apart(logits(fast), logits(sparse)) <= 1e-6


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_some_layers_may_stay_dense(name: str, tmp_path):
    model = dense(name)
    sparse = graphmoe.upcycle(model, 4, layers=[2, 0])
    assert [hasattr(layer.mlp, "experts") for layer in sparse.model.layers] == [True, False, True]
    assert apart(logits(sparse), logits(model)) <= 1e-6
    sparse.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(sparse))


def test_attention_implementation_and_own_fields_are_carried():
    model = LlamaForCausalLM._from_config(LlamaConfig(**COMMON, note="mine"), attn_implementation="eager")
    sparse = graphmoe.upcycle(model, 2, 1)
    assert sparse.config._attn_implementation == "eager"
    assert sparse.config.note == "mine"
    assert sparse.config.rms_norm_eps == model.config.rms_norm_eps != MixtralConfig().rms_norm_eps
    assert sparse.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_a_model_with_weights_of_another_class_is_refused():
    model = dense("llama")
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))
    with pytest.raises(
        ConfigError, match=r"no place in the sparse class.*layers\.1\.self_attn\.q_proj\.bias"
    ):
        graphmoe.upcycle(model, 4)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts: too few; expected at least 2; got 1"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: .*1 <= k <= 2; got 3"),
        ({"num_experts": 2, "num_experts_per_tok": 0}, "num_experts_per_tok: .*1 <= k <= 2; got 0"),
        ({"num_experts": 2, "router_std": 0.0}, "router_std: .*got 0.0"),
        ({"num_experts": 2, "noise_std": -1.0}, "noise_std: .*got -1.0"),
        ({"num_experts": 2, "noise_std": float("nan")}, "noise_std: .*got nan"),
        (
            {"num_experts": 2, "layers": [0, 3]},
            r"layers: no such layers; expected some of 0 to 2; got \[0, 3\]",
        ),
        ({"num_experts": 2, "layers": []}, "layers: no such layers"),
        ({"num_experts": 2, "layers": [1]}, "layers: MixtralForCausalLM has experts in every layer"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict, match: str):
    with pytest.raises(ConfigError, match=match):
        graphmoe.upcycle(dense("llama"), **options)


MIXED = Qwen3Config(**COMMON, **WINDOW, max_window_layers=1)


@pytest.mark.parametrize(
    "build, match",
    [
        (
            lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True)),
            "attention_bias: Mixtral.*got True",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, mlp_bias=True)), "mlp_bias: Mixtral.*got True"),
        (lambda: Qwen3ForCausalLM(MIXED), "layer_types: .*sliding_attention"),
        (lambda: MixtralForCausalLM(MixtralConfig(**COMMON)), "has experts already.*num_local_experts=8"),
        (lambda: GraphMoEForCausalLM(GraphMoEConfig(**COMMON)), "has experts already.*num_experts=4"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)),
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, .*got 'GPT2LMHeadModel'",
        ),
        (lambda: LlamaModel(LlamaConfig(**COMMON)), "one of LlamaForCausalLM.*got 'LlamaModel'"),
        (lambda: nn.Linear(3, 3), "one of LlamaForCausalLM.*got 'Linear'"),
    ],
)
def test_models_that_cannot_be_upcycled_are_refused(build, match: str):
    with pytest.raises(ConfigError, match=match):
        graphmoe.upcycle(build(), 4)


def test_weights_that_cannot_be_copied_are_refused():
    model = dense("llama")
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"one floating-point type.*torch\.bfloat16.*torch\.float32"):
        graphmoe.upcycle(model, 4)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with pytest.raises(ConfigError, match=r"weights cannot be copied.*meta"):
        graphmoe.upcycle(model, 4)
    model = dense("llama")
    model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ConfigError, match="quantised weights"):
        graphmoe.upcycle(model, 4)
