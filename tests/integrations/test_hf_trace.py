"""Tracing transformers' MoE models: the edges are exactly what their experts computed with."""

import pytest
import torch
from tiny_transformers import OPTIONS, tiny
from torch import Tensor, nn
from torch_geometric.data import HeteroData

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.integrations.hf_trace import expert_modules
from graphmoe.tracing import coactivation
from graphmoe.typing import ATTENDS, ROUTES

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def edges_of(data: HeteroData, layer: int) -> list[tuple[int, int, float]]:
    """Token, expert and weight of the routing edges of one layer."""
    routes, mine = data[ROUTES], data[ROUTES].layer == layer
    token, node = routes.edge_index[:, mine].tolist()
    index = data["expert"].index[node].tolist()
    assert (data["expert"].layer[node] == layer).all()
    return list(zip(token, index, routes.weight[mine].tolist(), strict=True))


def seen(model: nn.Module, **inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each expert module."""
    kept, hooks = {}, []
    for name, module in expert_modules(model).items():
        hooks.append(module.register_forward_hook(lambda m, a, out, n=name: kept.__setitem__(n, (a[0], out))))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return kept


# Oracle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_experts_applied_along_the_edges_give_what_the_layer_gave(name: str):
    model = tiny(name).double()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    data = graphmoe.trace(model, input_ids=IDS)
    assert data.validate() and data["token"].num_nodes == 14
    dense = {"qwen3_moe": {1}, "deepseek_v2": {0}, "deepseek_v3": {0}}.get(name, set())
    assert set(data["expert"].layer.tolist()) == set(range(3)) - dense
    for module_name, (x, expected) in seen(model, input_ids=IDS).items():
        module, layer = model.get_submodule(module_name), int(module_name.split(".")[2])
        out = torch.zeros_like(x)
        for token, expert, weight in edges_of(data, layer):
            alone = module(x[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1).double())
            out[token] += weight * alone[0].detach()
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # weights are kept in fp32


def test_groups_and_biases_make_other_edges_than_the_logits():
    """Top k of the logits would be wrong for most tokens here."""
    model = tiny("deepseek_v3")
    gate = model.model.layers[1].mlp.gate
    found, logits = [], []
    hook = gate.register_forward_hook(lambda m, a, out: logits.append(a[0].flatten(0, -2) @ m.weight.t()))
    data = graphmoe.trace(model, input_ids=IDS)
    hook.remove()
    served = [{e for t, e, _ in edges_of(data, 1) if t == token} for token in range(14)]
    for token, experts in enumerate(served):
        assert len({expert // 4 for expert in experts}) == 1  # one group of four
        found.append(experts != set(logits[0][token].topk(3).indices.tolist()))
    assert sum(found) > 7


# Law -------------------------------------------------------------------------------------------


def test_k_edges_a_token_and_no_edge_of_padding():
    model, mask = tiny("mixtral"), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    data = graphmoe.trace(model, input_ids=IDS, attention_mask=mask, attention=True)
    present = data["token"].present
    assert present.tolist() == mask.flatten().bool().tolist()
    assert torch.equal(data["token"].input_ids, IDS.flatten())
    assert data["token"].batch.tolist() == [0] * 7 + [1] * 7
    assert (data[ROUTES].edge_index[0].bincount(minlength=14) == 3 * 2 * present).all()
    attends = data[ATTENDS]
    source, target = attends.edge_index
    assert present[source].all() and present[target].all() and (source <= target).all()
    assert (source // 7 == target // 7).all()
    for layer in range(3):
        mine = attends.layer == layer
        total = torch.zeros(14).index_add(0, target[mine], attends.weight[mine])
        torch.testing.assert_close(total, present.float())
    whole = graphmoe.trace(model, input_ids=IDS[1:])
    theirs = [(token - 7, *edge) for token, *edge in edges_of(data, 2) if token >= 7]
    assert [edge[:2] for edge in sorted(theirs)] == [edge[:2] for edge in sorted(edges_of(whole, 2))]


def test_the_model_is_as_before(monkeypatch: pytest.MonkeyPatch):
    model = tiny("mixtral").train()
    model.model.layers[1].eval()  # as a frozen part is
    modes = [module.training for module in model.modules()]
    before = model.config._attn_implementation

    def untouched() -> None:
        assert [module.training for module in model.modules()] == modes
        assert model.config._attn_implementation == before != "eager"
        assert not any(module._forward_pre_hooks for module in model.modules())

    data = graphmoe.trace(model, input_ids=IDS, attention=True)
    assert not data[ROUTES].weight.requires_grad and all(p.grad is None for p in model.parameters())
    untouched()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graphmoe.trace(model, input_ids=IDS, attention=True)
    untouched()


def test_base_model_head_and_bfloat16_give_the_same_graph():
    model = tiny("deepseek_v3")
    first, second = (graphmoe.trace(m, input_ids=IDS) for m in (model, model.model))
    assert torch.equal(first[ROUTES].edge_index, second[ROUTES].edge_index)
    assert torch.equal(first[ROUTES].weight, second[ROUTES].weight)
    low = graphmoe.trace(model.bfloat16(), input_ids=IDS)
    assert low[ROUTES].weight.dtype == torch.float32
    assert low[ROUTES].edge_index.shape == first[ROUTES].edge_index.shape
    with_embeddings = graphmoe.trace(model, inputs_embeds=model.get_input_embeddings()(IDS).detach())
    assert torch.equal(with_embeddings[ROUTES].edge_index, low[ROUTES].edge_index)
    assert "input_ids" not in with_embeddings["token"]


def test_layers_with_different_numbers_of_experts_and_absent_experts():
    model = tiny("mixtral")
    small = tiny("mixtral", num_local_experts=3)
    model.model.layers[1].mlp = small.model.layers[1].mlp
    # What expert parallelism hands over for experts that live elsewhere.
    gate = model.model.layers[2].mlp.gate
    gate.register_forward_hook(lambda m, a, out: (out[0], out[1], torch.where(out[2] == 3, 4, out[2])))
    model.set_experts_implementation("eager")
    data = graphmoe.trace(model, input_ids=IDS)
    assert data["expert"].layer.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert data["expert"].index.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert len(edges_of(data, 1)) == 28 > len(edges_of(data, 2)) > 0
    assert max(expert for _, expert, _ in edges_of(data, 2)) < 3
    shares = coactivation(data)
    assert {layer: tuple(share.shape) for layer, share in shares.items()} == {0: (4, 4), 1: (3, 3), 2: (4, 4)}


def test_coactivation_counts_the_tokens_that_two_experts_serve():
    data = graphmoe.trace(tiny("qwen3_moe"), input_ids=IDS)
    share = coactivation(data)[2]
    pairs = {(a, b): 0 for a in range(6) for b in range(6)}
    for token in range(14):
        experts = {e for t, e, _ in edges_of(data, 2) if t == token}
        for a in experts:
            for b in experts:
                pairs[a, b] += 1
    assert share.flatten().tolist() == pytest.approx([count / 14 for count in pairs.values()])


# Wrong input -----------------------------------------------------------------------------------


def test_what_cannot_be_traced_is_a_typed_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"nothing to trace.*got 'LlamaForCausalLM'"):
        graphmoe.trace(tiny("llama"), input_ids=IDS)
    model = tiny("mixtral")
    with pytest.raises(ConfigError, match=r"input_ids or inputs_embeds.*no tokens.*got \['past'\]"):
        graphmoe.trace(model, past=None)
    with pytest.raises(ConfigError, match="not every layer has weights"):
        graphmoe.trace(tiny("jamba", num_experts=4, mamba_dt_rank=4), input_ids=IDS, attention=True)
    layers = model.model.layers
    monkeypatch.setattr(layers[0].mlp, "forward", lambda x: layers[1].mlp(x))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts.*several times.*got 2"):
        graphmoe.trace(model, input_ids=IDS)
    for layer in layers:
        monkeypatch.setattr(layer.mlp, "forward", lambda x: x)
    with pytest.raises(ConfigError, match=r"no expert was asked.*got 'MixtralForCausalLM'"):
        graphmoe.trace(model, input_ids=IDS)
    few = lambda x: layers[0].mlp.experts(x[:, 0], *[x[:, 0, :1].long()] * 2).unsqueeze(1)  # noqa: E731
    monkeypatch.setattr(layers[0].mlp, "forward", few)
    with pytest.raises(ConfigError, match=r"something else than tokens.*\[14, k\]"):
        graphmoe.trace(model, input_ids=IDS)
