"""What experts do together: the probes equal loops over tokens, and leave the model as it was."""

import copy

import numpy as np
import pytest
import torch
from tiny_model import tiny_model

from graphmoe import metrics
from graphmoe.errors import ConfigError, DataError
from graphmoe.nn.route import sort_routes
from graphmoe.train import collaboration
from graphmoe.train.collaboration import gate_spread, gate_sums, probe_collaboration, probe_inference
from graphmoe.train.evaluate import expert_summary, mean_loss, probe_experts
from graphmoe.typing import Record

WINDOWS = np.random.default_rng(0).integers(0, 31, (12, 17))


def build(k=2, **options):
    """A model whose experts really differ in what they say, hear and are told."""
    defaults = {"coupling": "collab", "fusion": "gated", "collab_heads": 2, "attention_dropout": 0.1}
    net = tiny_model(num_experts_per_tok=k, dropout=0.1, **{**defaults, **options})
    for layer in net.moe_layers():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        if layer.ghosts is not None:  # the first active, the others asleep
            layer.ghosts.phase[0], layer.ghosts.steps[0] = 2, 100
    return net


def records_of(net, windows):
    """Records with attention of all tokens at once."""
    for layer in net.moe_layers():
        layer.track_attention = True
    records = net.eval()(torch.from_numpy(windows[:, :-1]), output_records=True).records
    for layer in net.moe_layers():
        layer.track_attention = False
    return records


def by_loops(record, *, mediator):
    """Who listens to whom, and the level of one who does not care, by loops over tokens and slots."""
    routing, k = record.routing, record.routing.k
    size, tokens = routing.num_experts + mediator, routing.logits.size(0)
    heard, met, uniform = torch.zeros(size, size), torch.zeros(size, size), []
    slots = torch.full((tokens, k), -1)
    for place, expert in zip(routing.perm.tolist(), routing.expert.tolist(), strict=True):
        slots[place // k, place % k] = expert
    for token in range(tokens):
        nodes = [(place, expert) for place, expert in enumerate(slots[token].tolist()) if expert < size]
        nodes = [node for node in nodes if node[1] < routing.num_experts]
        if mediator:
            nodes.append((k, routing.num_experts))
        uniform.append(1 / len(nodes))
        for place, listening in nodes:
            for other, speaking in nodes:
                heard[listening, speaking] += record.attention[:, token, :, place, other].mean()
                met[listening, speaking] += 1
    return heard / met, np.mean(uniform)


@torch.no_grad()
@pytest.mark.parametrize(
    "k, options",
    [
        (2, {}),
        (3, {"collab_mediator": False}),
        (4, {"num_ghosts": 2}),
        (1, {"coupling_layers": 1}),
        (2, {"router": "contextual"}),
        (2, {"fusion": "sum", "collab_mediator": False}),
    ],
)
def test_probe_equals_loops_over_tokens(double, k, options):
    net = build(k, **options).double()
    mediator = options.get("collab_mediator", True)
    probe = probe_collaboration(net, WINDOWS)
    for index, record in enumerate(records_of(net, WINDOWS)):
        want, uniform = by_loops(record, mediator=mediator)
        if k == 1 or "num_ghosts" in options:
            assert want.isnan().any()  # some never meet
        assert want.nan_to_num(0).std() > 0.01  # attention that says something
        got = probe["final_attention"][index]
        torch.testing.assert_close(got, want.float(), equal_nan=True)
        assert probe["final_attention_uniform"][index].item() == pytest.approx(uniform)
        want = metrics.coactivation(record.routing)
        torch.testing.assert_close(probe["final_coactivation"][index], want.float())
        want = metrics.random_coactivation(want.diagonal())
        torch.testing.assert_close(probe["final_coactivation_random"][index], want.float())
        if mediator:
            assert probe["final_mediator_gate"][index].item() == pytest.approx(record.gate.mean().item())
            want = record.gate.std(correction=0).item()
            assert want > 0.01
            assert probe["final_mediator_gate_std"][index].item() == pytest.approx(want, rel=1e-5)
        else:
            assert "final_mediator_gate" not in probe
    assert all(value.dtype == torch.float32 for value in probe.values())


def test_batches_add_up(monkeypatch):
    net = build()
    whole = probe_collaboration(net, WINDOWS)
    monkeypatch.setattr(collaboration, "BATCH_TOKENS", 40)  # two windows at once
    lengths = []
    hook = net.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: lengths.append(len(inputs[0]))
    )
    parts = probe_collaboration(net, WINDOWS)
    hook.remove()
    assert lengths == [2] * 6
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, equal_nan=True)


def test_experts_that_only_hear_themselves_do():
    probe = probe_collaboration(build(collab_graph="self"), WINDOWS)
    torch.testing.assert_close(probe["final_attention"].nan_to_num(0), torch.eye(5).expand(2, 5, 5))


@pytest.mark.parametrize("options", [{"coupling": "none", "fusion": "sum"}, {"coupling_layers": 0}])
def test_without_talk_there_is_coactivation_only(options):
    probe = probe_collaboration(build(**options), WINDOWS)
    assert set(probe) == {"final_coactivation", "final_coactivation_random"}
    dense = tiny_model(num_experts=1, num_experts_per_tok=1)
    assert probe_collaboration(dense, WINDOWS) == probe_inference(dense, WINDOWS) == {}


def test_summary_has_the_gate_of_the_mediator():
    net = build()
    probe = probe_collaboration(net, WINDOWS)
    summary = expert_summary(probe_experts(net, WINDOWS) | probe)
    assert summary["mediator_gate"] == probe["final_mediator_gate"].tolist()


# Knobs of inference ----------------------------------------------------------------------------


def loss_with(net, **options):
    """Mean loss of a model that always passes these options on."""

    class Bound(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, **inputs):
            return self.net(**inputs, **options)

    return mean_loss(Bound(), WINDOWS)


def test_losses_are_those_of_a_model_with_these_numbers():
    net = build(reasoning_steps=2, coupling_layers=3)
    probe = probe_inference(net, WINDOWS, rounds=(4, 0), steps=(1,))
    assert probe["final_inference_rounds"].tolist() == [0, 3, 4]  # the numbers of training are among them
    assert probe["final_inference_steps"].tolist() == [1, 2]
    assert probe["final_inference_trained"].tolist() == [2, 3]
    for row, steps in enumerate((1, 2)):
        for column, rounds in enumerate((0, 3, 4)):
            want = loss_with(net, reasoning_steps=steps, collab_rounds=rounds)
            assert probe["final_inference_loss"][row, column].item() == pytest.approx(want, rel=1e-6)
    assert len(set(probe["final_inference_loss"].flatten().tolist())) == 6
    assert probe["final_inference_loss"][1, 1].item() == pytest.approx(mean_loss(net, WINDOWS))


def test_error_is_that_of_paired_differences():
    net = build()
    probe = probe_inference(net, WINDOWS, rounds=(0,), steps=())
    without, trained = ([loss_of(net, window, rounds) for window in WINDOWS] for rounds in (0, 2))
    change = np.array(without) - np.array(trained)
    want = change.std(ddof=1) / len(change) ** 0.5
    assert probe["final_inference_error"].tolist()[0] == pytest.approx([want, 0], rel=1e-4)
    one = probe_inference(net, WINDOWS[:1])
    assert one["final_inference_error"].isnan().all() and one["final_inference_loss"].isfinite().all()


def loss_of(net, window, rounds):
    ids = torch.from_numpy(window[None])
    logits = net.eval()(ids[:, :-1], collab_rounds=rounds).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, 1:]).item()


def test_a_knob_that_is_not_there_is_not_turned():
    probe = probe_inference(build(reasoning_steps=1, coupling="none", fusion="sum"), WINDOWS)
    assert probe["final_inference_rounds"].tolist() == [0]
    assert probe["final_inference_steps"].tolist() == [1, 2, 4]
    assert probe["final_inference_trained"].tolist() == [1, 0]
    probe = probe_inference(build(), WINDOWS)
    assert probe["final_inference_steps"].tolist() == [0]
    assert probe["final_inference_loss"].shape == (1, 4)
    assert probe_inference(build(coupling_layers=0), WINDOWS) == {}
    assert probe_inference(build(coupling="hyper", fusion="sum"), WINDOWS) == {}


def test_scores_as_many_tokens_as_it_may():
    net = build()
    probe = probe_inference(net, WINDOWS, max_tokens=50, rounds=())
    assert probe["final_inference_loss"].item() == pytest.approx(mean_loss(net, WINDOWS[[0, 6, 11]]))


# Nothing changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [probe_collaboration, probe_inference])
def test_changes_nothing_in_the_model(probe):
    net = build(num_ghosts=1, reasoning_steps=1).train()
    net.model.layers[1].eval()
    net.moe_layers()[1].track_attention = True  # by the user, who wants to keep it
    modes = {name: module.training for name, module in net.named_modules()}
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first = probe(net, WINDOWS)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [layer.track_attention for layer in net.moe_layers()] == [False, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    second = probe(net, WINDOWS)
    assert all(torch.equal(first[name].nan_to_num(-1), second[name].nan_to_num(-1)) for name in first)


@pytest.mark.parametrize("probe", [probe_collaboration, probe_inference])
def test_changes_nothing_after_an_error_either(monkeypatch, probe):
    net = build().train()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(net.moe_layers()[1].experts, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe(net, WINDOWS)
    assert all(module.training for module in net.modules())
    assert not any(layer.track_attention for layer in net.moe_layers())


# Gates -----------------------------------------------------------------------------------------


def record_of_gates(gate, absent):
    """A record of one layer with these gates; ``absent`` tokens have no expert."""
    expert = torch.arange(len(gate)).unsqueeze(1) % 2
    expert[absent] = 2
    routing = sort_routes(expert, torch.ones(len(gate), 1), torch.zeros(len(gate), 2))
    return Record(routing, None, None, torch.tensor(0), None, gate=gate)


def test_gates_of_tokens_without_experts_do_not_count():
    gate = torch.tensor([0.2, 0.9, 0.6, 0.1, 0.4])
    parts = [record_of_gates(gate, [1]), record_of_gates(1 - gate, [])]
    values = torch.cat([gate[[0, 2, 3, 4]], 1 - gate]).double()
    mean, deviation = gate_spread(sum(gate_sums(part) for part in parts))
    assert mean.item() == pytest.approx(values.mean().item())
    assert deviation.item() == pytest.approx(values.std(correction=0).item())
    nobody = gate_spread(gate_sums(record_of_gates(gate, [0, 1, 2, 3, 4])))
    assert [value.item() for value in nobody] == [0, 0]


def test_wrong_input():
    net = build()
    for probe in (probe_collaboration, probe_inference):
        with pytest.raises(DataError, match="windows"):
            probe(net, WINDOWS[:0])
        with pytest.raises(ConfigError, match="max_tokens"):
            probe(net, WINDOWS, max_tokens=0)
    with pytest.raises(ConfigError, match="rounds, steps: not so many"):
        probe_inference(net, WINDOWS, rounds=(-1,))
    with pytest.raises(ConfigError, match=r"steps >= 1; got \[\[0, 1, 2, 4\], \[0\]\]"):
        probe_inference(net, WINDOWS, steps=(0,))
