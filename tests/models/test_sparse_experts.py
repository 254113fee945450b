"""Language models whose experts are sets of edges: state, first sizes, decoding, training. Causality, cached
decoding and gradients are tested with those of the other options."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model

import graphmoe
from graphmoe.errors import GraphError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM
from graphmoe.nn import SparseExpert, edge_form
from graphmoe.train.rewire import sparse_layers


def rewired(**options):
    """A model with edges that are not those of its construction."""
    model = tiny_model(expert_density=0.3, **options)
    for layer in sparse_layers(model):
        layer.rewire(0.4)
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_edges_are_saved_and_loaded(tmp_path):
    model, ids = rewired(), torch.randint(31, (2, 9))
    model.save_pretrained(tmp_path)
    loaded = graphmoe.load(tmp_path)
    assert type(loaded.model.layers[0].feed_forward.experts) is SparseExpert
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert all(layer.survival() < 1 for layer in sparse_layers(loaded))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-6, atol=1e-6)


def test_edges_out_of_range_are_found_when_they_are_loaded(tmp_path):
    rewired().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if key.endswith("gate_up_proj.0.source"))
    state[name][3] = 1000
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraphError, match="id out of range"):
        logits(graphmoe.load(tmp_path), torch.randint(31, (2, 9)))


def test_forms_agree_and_decoding_with_a_cache_is_decoding():
    model, ids = rewired().double(), torch.randint(31, (2, 9))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fast = logits(model, ids)
    with edge_form(model):
        torch.testing.assert_close(logits(model, ids), fast, rtol=0, atol=1e-12)
    cached, full = (
        model.generate(ids, max_new_tokens=60, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, full)


def test_sums_start_as_large_as_those_of_matrices():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "expert_density": 0.25}
    model = GraphMoEForCausalLM(GraphMoEConfig(**sizes))
    for block in model.model.layers:
        experts = block.feed_forward.experts
        for layer in experts.gate_up_proj:
            assert abs(layer.weight.std() / 0.02 / 2 - 1) < 0.1
        for layer in experts.down_proj:
            assert abs(layer.weight.std() / 0.02 - 1) < 0.1


def test_what_a_token_costs_are_its_edges():
    sparse, dense = tiny_model(expert_density=0.25), tiny_model()
    fewer = 2 * 4 * (3 * 16 * 8) * 3 // 4
    assert sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in sparse.parameters()) == fewer
    assert dense.num_active_parameters() - sparse.num_active_parameters() == fewer // 2


def test_one_batch_overfits_with_edges_that_move():
    torch.manual_seed(0)
    model = tiny_model(expert_density=0.3, hidden_size=32, intermediate_size=32)
    ids = torch.randint(31, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for step in range(100):
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (20, 40):
            for layer in sparse_layers(model):
                layer.rewire(0.2)
    assert out.lm_loss < 0.4
