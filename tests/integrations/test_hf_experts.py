"""``experts_implementation="graphmoe"``: outputs and gradients of transformers' models stay what they are."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from graphmoe.integrations import hf, hf_trace
from graphmoe.ops import grouped_mlp

hf.register()

COMMON = {
    "vocab_size": 47,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
DEEPSEEK = {
    "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 24,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **QWEN, norm_topk_prob=True, head_dim=8),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=24, num_experts=8, num_experts_per_tok=4),
    "deepseek_v2": DeepseekV2Config(**{**COMMON, **DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": DeepseekV3Config(**{**COMMON, **DEEPSEEK}),
}


def build(config: PreTrainedConfig, implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = copy.deepcopy(config)
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation).to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """Relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def learn(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss to all parameters and to the embedded input."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    outputs = model(inputs_embeds=embedded, labels=ids, use_cache=False)
    outputs.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), {"input": embedded.grad, **gradients}


def experts_of(
    cls: type[nn.Module], config: PreTrainedConfig, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """One module of experts twice: as transformers computes it in a loop, and as we do."""
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    eager = cls(config).to(dtype)
    with torch.no_grad():
        for weight in eager.parameters():
            weight.normal_(std=0.3)
    ours = copy.deepcopy(eager)
    ours.config._experts_implementation = "graphmoe"
    return eager, ours


def run(experts: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and the gradients of a fixed scalar of it to the input, the weights and all parameters."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = experts(x, index, weight)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, weight.grad, *(p.grad for p in experts.parameters())]
    return [torch.zeros(()) if g is None else g for g in found]


def chosen(num_tokens: int, k: int, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.rand(num_tokens, num_experts).topk(k).indices
    return (
        torch.randn(num_tokens, 32, dtype=dtype), index, torch.rand(num_tokens, k, dtype=dtype)
    )  # fmt: skip


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_and_learn_what_eager_does(name: str, dtype: torch.dtype, tol: float):
    eager, ours = (build(CONFIGS[name], how, dtype) for how in ("eager", "graphmoe"))
    ids = torch.randint(1, 47, (2, 11))
    logits, gradients = learn(eager, ids)
    own_logits, own_gradients = learn(ours, ids)
    assert apart(own_logits, logits) <= tol
    assert any("experts" in name for name in gradients)
    for key, value in gradients.items():
        assert apart(own_gradients[key], value) <= tol, key


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_models_in_bfloat16_are_within_its_rounding(name: str):
    """One rounding is up to 4e-3, and many follow one another: gradients of transformers' own loop are 1.5 to
    2.5 % from those in float32, so that ours cannot be closer to it than that. Outputs can."""
    eager, ours, exact = (build(CONFIGS[name], how, torch.bfloat16) for how in ("eager", "graphmoe", "eager"))
    exact.float()  # of the same, rounded weights
    torch.manual_seed(1)
    ids = torch.randint(1, 47, (2, 11))
    served = [hf_trace.run(model, {"input_ids": ids}, ids.numel()).served for model in (eager, ours)]
    for one, other in zip(*served, strict=True):  # a flipped choice would not be a rounding
        assert torch.equal(one.index, other.index)
    (logits, loop), (own_logits, own), (true_logits, true) = (learn(m, ids) for m in (eager, ours, exact))
    assert own_logits.dtype == torch.bfloat16
    assert far({"": own_logits}, {"": logits}) <= 1e-2
    assert far({"": own_logits}, {"": true_logits}) <= 1.1 * far({"": logits}, {"": true_logits})
    assert far(own, loop) <= 1.5e-2
    rounding = far(loop, true)
    assert far(own, loop) <= rounding <= 3e-2
    assert far(own, true) <= 1.1 * rounding


def far(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """How far tensors are from others, each relative to its norm: the root of the mean square of all."""
    offs = [
        (found[key].double() - value.double()).norm() / value.double().norm() for key, value in wanted.items()
    ]
    return torch.stack(offs).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_eager(dtype: torch.dtype):
    exact, _ = experts_of(MixtralExperts, CONFIGS["mixtral"])
    eager, ours = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    ours.config = copy.deepcopy(ours.config)
    ours.config._experts_implementation = "graphmoe"
    x, index, weight = chosen(64, 2, 5, torch.float64)
    exact.to(dtype).double()  # of the same, rounded weights
    truth = run(exact, x.to(dtype).double(), index, weight.to(dtype).double())
    loop = run(eager, x.to(dtype), index, weight.to(dtype))
    own = run(ours, x.to(dtype), index, weight.to(dtype))
    for value, other, true in zip(own, loop, truth, strict=True):
        assert value.dtype == dtype
        off = (value.double() - true).norm() / true.norm()
        assert off <= 1e-2
        assert off <= 1.25 * (other.double() - true).norm() / true.norm()


def test_autocast_casts_as_linear_does():
    eager, ours = experts_of(MixtralExperts, CONFIGS["mixtral"], torch.float32)
    args = chosen(33, 2, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loop, own = run(eager, *args), run(ours, *args)
    for value, other in zip(own, loop, strict=True):
        assert value.dtype == other.dtype == torch.float32
        assert (value - other).norm() <= 1e-2 * other.norm()


def test_weights_in_float32_beside_hidden_states_in_half_precision():
    """As routers give them that weigh in float32."""
    _, ours = experts_of(MixtralExperts, CONFIGS["mixtral"], torch.bfloat16)
    x, index, weight = chosen(9, 2, 5, torch.bfloat16)
    out, grad_x, grad_weight, *_ = run(ours, x, index, weight.float())
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_experts_of_other_ranks_are_absent():
    """Under expert parallelism they have an id behind the last one."""
    eager, ours = experts_of(MixtralExperts, CONFIGS["mixtral"])
    x, index, weight = chosen(17, 3, 5, torch.float64)
    index[::2, 1] = 5
    index[3] = 5
    loop, own = run(eager, x, index, weight), run(ours, x, index, weight)
    for value, other in zip(own, loop, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    assert not own[0][3].any() and not own[2][3].any()
    # Whatever weight such a row has, 0 or not, it is not looked at.
    wild = weight.masked_fill(index == 5, float("nan"))
    torch.testing.assert_close(ours(x, index, wild), own[0], rtol=0, atol=0)


def test_one_token_and_none():
    eager, ours = experts_of(MixtralExperts, CONFIGS["mixtral"])
    args = chosen(1, 2, 5, torch.float64)
    for value, other in zip(run(ours, *args), run(eager, *args), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    ours.zero_grad()
    out, *gradients = run(ours, *chosen(0, 2, 5, torch.float64))
    assert out.shape == gradients[0].shape == (0, 32)
    assert [g.shape for g in gradients[2:]] == [p.shape for p in ours.parameters()]
    assert not any(g.any() for g in gradients)


def test_gradient_checkpointing_changes_nothing():
    plain, again = (build(CONFIGS["qwen3_moe"], "graphmoe", torch.float64).train() for _ in range(2))
    again.activation_checkpointing_enable()
    ids = torch.randint(1, 47, (2, 7))
    logits, gradients = learn(plain, ids)
    own_logits, own_gradients = learn(again, ids)
    assert torch.equal(own_logits, logits)
    assert all(torch.equal(own_gradients[key], value) for key, value in gradients.items())


def test_compiles_without_a_graph_break():
    _, ours = experts_of(MixtralExperts, CONFIGS["mixtral"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    args = chosen(13, 2, 5, torch.float64)
    plain = run(ours, *args)
    ours.zero_grad()
    for value, other in zip(run(compiled, *args), plain, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


def test_saved_models_load_with_it_and_generate_the_same(tmp_path):
    eager = build(CONFIGS["qwen2_moe"], "eager").eval()
    eager.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="graphmoe")
    assert ours.config._experts_implementation == "graphmoe"
    prompt = torch.randint(1, 47, (2, 5))
    options = {"max_new_tokens": 24, "do_sample": False, "use_cache": True}
    options["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = ours.generate(prompt, **options)
    assert torch.equal(tokens, eager.generate(prompt, **options))
    with torch.no_grad():
        assert apart(ours(tokens).logits, eager(tokens).logits) <= 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert "graphmoe" not in (tmp_path / "again" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert plain.config._experts_implementation == "grouped_mm"


def test_is_chosen_by_name_after_register(monkeypatch):
    hf.register()
    functions = len(ALL_EXPERTS_FUNCTIONS)
    hf.register()
    assert len(ALL_EXPERTS_FUNCTIONS) == functions
    assert ALL_EXPERTS_FUNCTIONS["graphmoe"] is hf.experts_forward
    model = build(CONFIGS["mixtral"], "eager")
    model.set_experts_implementation("graphmoe")
    assert model.config._experts_implementation == "graphmoe"
    ids = torch.randint(1, 47, (1, 4))
    calls = []
    monkeypatch.setattr(
        hf, "grouped_mlp", lambda *args, **kwargs: calls.append(1) or grouped_mlp(*args, **kwargs)
    )
    with torch.no_grad():
        model(ids)
    assert len(calls) == 2  # layers


ARIA = AriaTextConfig(hidden_size=32, intermediate_size=24, moe_num_experts=5)
GPT_OSS = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=5)
NEMOTRON = {"hidden_size": 32, "moe_intermediate_size": 24, "n_routed_experts": 5}


@pytest.mark.parametrize(
    "cls, config",
    [
        (AriaExperts, ARIA),
        (NemotronHExperts, NemotronHConfig(**NEMOTRON, mlp_hidden_act="gelu")),
    ],
)
def test_transposed_weights_and_experts_without_a_gate(cls: type[nn.Module], config: PreTrainedConfig):
    eager, ours = experts_of(cls, config)
    assert hf.unsupported(ours) == ""
    args = chosen(21, 2, 5, torch.float64)
    for value, other in zip(run(ours, *args), run(eager, *args), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "cls, config, reason",
    [
        (GptOssExperts, GPT_OSS, "GptOssExperts: its projections have biases"),
        (NemotronHExperts, NemotronHConfig(**NEMOTRON), "NemotronHExperts: its activation is ReLUSquared"),
        (
            MixtralExperts,
            MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=5, hidden_act="gelu"),
            "MixtralExperts: its activation is GELUActivation, not SiLU",
        ),
    ],
)
def test_other_experts_fall_back_and_say_so(cls, config, reason: str, dtype, tol: float, caplog):
    eager, ours = experts_of(cls, config, dtype)
    args = chosen(21, 2, 5, dtype)
    type(hf._logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        own = run(ours, *args)
        ours(*args)
    assert [reason in message for message in caplog.messages] == [True]
    for value, other in zip(own, run(eager, *args), strict=True):
        assert apart(value, other) <= tol
