"""The sparse classifier: the dense network it stands for, saving, loading, what it refuses."""

import pytest
import torch
from contract import assert_every_parameter_learns, assert_same
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from graphmoe import load
from graphmoe.errors import ConfigError, GraphError
from graphmoe.models import SparseMLP, SparseMLPConfig
from graphmoe.nn import SparseLinear, edge_form
from graphmoe.typing import FEEDS


def small(**options):
    sizes = {"input_size": 12, "hidden_sizes": [9, 7], "num_labels": 3, "density": 0.4}
    return SparseMLP(SparseMLPConfig(**{**sizes, **options}))


def dense_forward(model, x):
    for layer in model.layers:
        weight = layer.dense_weight() if isinstance(layer, SparseLinear) else layer.weight
        x = F.linear(x, weight, layer.bias)
        x = x if layer is model.layers[-1] else model.act(x)
    return x


@pytest.mark.parametrize("options", [{}, {"density": 1.0}, {"dense_output": False}, {"hidden_act": "gelu"}])
def test_equals_the_network_of_dense_matrices(double, options):
    model, x = small(**options).eval(), torch.randn(5, 3, 2, 2)
    torch.testing.assert_close(model(x).logits, dense_forward(model, x.flatten(1)))
    labels = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(model(x, labels=labels).loss, F.cross_entropy(model(x).logits, labels))
    states = model(x, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in states] == [(5, 9), (5, 7)]


def test_edge_form_and_a_gradient_for_every_parameter(double):
    model, x = small(dropout=0.0), torch.randn(64, 12, requires_grad=True)

    def edges():
        with edge_form(model):
            return model(x).logits

    assert_same(model, [x], lambda: model(x).logits, edges)
    assert_every_parameter_learns(model, model(x, labels=torch.arange(64) % 3).loss)


def test_layers_in_one_operation_equal_layers_called_one_by_one(double):
    model, x = small(dropout=0.3), torch.randn(40, 12)
    labels, found = torch.arange(40) % 3, []
    for alone in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        heard = [layer.register_forward_hook(lambda *_: None) for layer in model.layers[:1] if alone]
        out = model(x, labels=labels)
        out.loss.backward()
        assert (type(out.logits.grad_fn.next_functions[0][0]).__name__ == "_SparseLayersBackward") != alone
        found.append([out.logits.detach(), *(p.grad for p in model.parameters())])
        for hook in heard:
            hook.remove()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_who_listens_to_a_layer_hears_it():
    model, x, heard = small(), torch.randn(5, 12), []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: heard.append(tuple(out.shape)))
    model(x)
    assert heard == [(9, 5), (7, 5), (5, 3)]  # samples are the rows of a dense layer


def test_who_listens_to_gradients_of_a_layer_hears_them():
    model, heard = small(), []
    for layer in model.layers:
        layer.register_full_backward_hook(lambda *_: heard.append(1))
    model(torch.randn(5, 12, requires_grad=True), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert len(heard) == 3


def test_dropout_alone_may_be_in_training():
    model, x = small(dropout=0.5).eval(), torch.randn(5, 12)
    assert torch.equal(model(x).logits, model(x).logits)
    model.dropout.train()
    assert not torch.equal(model(x).logits, model(x).logits)


def test_autocast_gives_dense_layers_their_precision():
    model, x = small(dropout=0.0), torch.randn(5, 12)
    exact = model(x, labels=torch.tensor([0, 1, 2, 0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, labels=torch.tensor([0, 1, 2, 0, 1]))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits.float(), exact.logits, atol=3e-2, rtol=3e-2)


def test_edges_are_counted_and_shared():
    config = SparseMLPConfig(num_labels=10)
    edges = [round(d * i * o) for d, (i, o) in zip(config.densities(), config.shapes(), strict=True)]
    assert sum(edges) == pytest.approx(139_700, abs=2) and edges[-1] == 10_000
    model = small(density=0.5)
    assert model.num_edges() == pytest.approx(0.5 * (12 * 9 + 9 * 7 + 7 * 3), abs=1)
    assert len(model.sparse_layers()) == 2 and not small(density=1).sparse_layers()
    data = model.to_hetero()
    assert data["neuron"].num_nodes == 28 and data[FEEDS].edge_index.size(1) == model.num_edges() - 21


def test_saved_edges_come_back(tmp_path):
    model, x = small().eval(), torch.randn(5, 12)
    for layer in model.sparse_layers():
        layer.rewire(0.5)
    model.save_pretrained(tmp_path)
    for again in (load(tmp_path), AutoModelForImageClassification.from_pretrained(tmp_path).eval()):
        assert type(again) is SparseMLP and torch.equal(again(x).logits, model(x).logits)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path).hidden_sizes == [9, 7]


@pytest.mark.parametrize("value", [-1, 12, 2**31 - 1])
def test_a_damaged_edge_is_an_error_and_no_crash(tmp_path, value):
    small().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["layers.0.source"][3] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraphError, match="source id out of range"):
        load(tmp_path)(torch.ones(1, 12))


BAD = {
    "at least 1": {"hidden_sizes": [4, 0]},
    "hidden_sizes": {"hidden_sizes": []},
    "nothing to tell apart": {"num_labels": 1},
    "unknown activation": {"hidden_act": "sine"},
    "no chance": {"dropout": 1.0},
    "no share of the places": {"density": 0.0},
    "dense layers alone": {"density": 0.05},
    "unknown distribution": {"distribution": "fair"},
}


@pytest.mark.parametrize("match", BAD)
def test_wrong_configs(match):
    with pytest.raises(ConfigError, match=match):
        small(**BAD[match])


def test_inputs_of_another_size():
    with pytest.raises(ConfigError, match="12 values each"):
        small()(torch.ones(2, 3, 3))
