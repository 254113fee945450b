import copy
import json
import math

import numpy as np
import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError, DataError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM
from graphmoe.nn import MoELayer
from graphmoe.train.evaluate import expert_summary, mean_loss, probe_experts, window_losses

WINDOWS = np.random.default_rng(0).zipf(1.4, (12, 17)).clip(1, 60)


def build(k=2, ghosts=0, **options):
    net = GraphMoEForCausalLM(
        GraphMoEConfig(
            **{
                "vocab_size": 61,
                "hidden_size": 16,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_experts": 4,
                "num_experts_per_tok": k,
                "num_ghosts": ghosts,
                "coupling": "hyper",
                "dropout": 0.1,
                "attention_dropout": 0.1,
                **options,
            }
        )
    )
    for layer in net.moe_layers():
        if layer.ghosts is not None:  # the first active, the others asleep
            layer.ghosts.phase[0], layer.ghosts.steps[0] = 2, 100
    return net


def loop_of_one_layer(net, index, ids):
    """Outputs of all experts on all tokens, and which expert serves which token, by loops."""
    layer, kept = net.moe_layers()[index], []
    hook = layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    record = net.eval()(ids, output_records=True).records[index]
    hook.remove()
    x = kept[0].reshape(-1, net.config.hidden_size)
    outputs = []
    for gate_up, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True):
        gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ down.t())
    serves = torch.zeros(len(outputs) + 1, len(x), dtype=torch.bool)
    for token, expert in zip(record.routing.token, record.routing.expert, strict=True):
        serves[expert, token] = True
    return torch.stack(outputs), serves[:-1], record.routing


@torch.no_grad()
@pytest.mark.parametrize("k, ghosts", [(2, 0), (3, 2), (4, 2)])
def test_probe_equals_loops_over_experts_and_tokens(double, k, ghosts):
    net = build(k, ghosts).double()
    probe = probe_experts(net, WINDOWS)
    ids = torch.from_numpy(WINDOWS[:, :-1])
    live = 4 + (ghosts > 0)
    for index in range(2):
        outputs, serves, routing = loop_of_one_layer(net, index, ids)
        want = metrics.linear_cka(outputs[:live])
        torch.testing.assert_close(probe["final_cka"][index, :live, :live], want.float())
        assert probe["final_cka"][index, live:].isnan().all()
        assert probe["final_cka"][index, :, live:].isnan().all()
        means = torch.stack([outputs[e, serves[e]].mean(dim=0) for e in range(live)])
        want = metrics.specialisation(means)
        torch.testing.assert_close(probe["final_specialisation"][index], want.float())
        torch.testing.assert_close(
            probe["final_load"][index], serves.sum(dim=1).float() / serves.sum(), rtol=1e-6, atol=0
        )
        want = metrics.routing_entropy(routing)
        torch.testing.assert_close(probe["final_routing_entropy"][index], want.float())
        # Fewer ids than classes here: every id is a class of its own.
        want = metrics.mutual_information(routing.expert, ids.flatten()[routing.token], 4 + ghosts, 61)
        torch.testing.assert_close(probe["final_mutual_information"][index], want.float())


def test_every_figure_has_its_chance_level():
    probe = probe_experts(build(3, 2), WINDOWS)
    tokens = WINDOWS[:, :-1].size
    assert probe["final_cka_random"].tolist() == pytest.approx([metrics.random_cka(tokens, 16)] * 2)
    assert probe["final_specialisation_random"].tolist() == pytest.approx(
        [metrics.random_specialisation(5, 16)] * 2
    )
    assert probe["final_routing_entropy_random"].tolist() == pytest.approx([math.log2(5)] * 2)
    assert (probe["final_mutual_information_random"] < probe["final_mutual_information"]).all()
    assert (probe["final_mutual_information_random"] > 0).all()
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in probe.values())


def test_experts_with_equal_weights_are_found_equal():
    net = build()
    with torch.no_grad():
        for layer in net.moe_layers():
            for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
                weight[:] = weight[:1].clone()
    probe = probe_experts(net, WINDOWS)
    torch.testing.assert_close(probe["final_cka"], torch.ones(2, 4, 4))
    # Their means differ only by the tokens they serve.
    assert (probe["final_specialisation"] < 0.6 * probe["final_specialisation_random"]).all()


def test_dense_routing_carries_no_information():
    probe = probe_experts(build(4), WINDOWS)
    assert (probe["final_mutual_information"].abs() < 1e-9).all()
    assert (probe["final_mutual_information_random"] > 0.01).all()


def test_rare_ids_are_one_class():
    net = build(vocab_size=2000, hidden_size=8, max_position_embeddings=4000)
    often, rare = np.arange(255).repeat(4), np.arange(1000, 1900)
    ids = np.random.default_rng(1).permutation(np.concatenate([often, rare]))
    windows = np.concatenate([ids, ids[:1]])[None]  # the last token is not read
    probe = probe_experts(net, windows, max_tokens=4000)
    _, _, routing = loop_of_one_layer(net, 0, torch.from_numpy(windows[:, :-1]))
    classes = torch.from_numpy(ids).clamp(max=255)[routing.token]
    want = metrics.mutual_information(routing.expert, classes, 4, 256)
    torch.testing.assert_close(probe["final_mutual_information"][0], want.float())


@pytest.mark.parametrize("max_tokens, shape", [(2048, (12, 16)), (50, (3, 16)), (10, (1, 10)), (1, (1, 1))])
def test_reads_as_many_tokens_as_it_may(max_tokens, shape):
    net, seen = build(), []
    hook = net.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    probe_experts(net, WINDOWS, max_tokens=max_tokens)
    hook.remove()
    assert len(seen) == 1 and seen[0].shape == shape
    if max_tokens == 50:  # spread over all windows
        assert torch.equal(seen[0], torch.from_numpy(WINDOWS[[0, 6, 11], :-1]))


def test_changes_nothing_in_the_model():
    net = build(3, 2).train()
    net.model.layers[1].eval()  # a part that the user froze stays as it is
    modes = {name: module.training for name, module in net.named_modules()}
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first = probe_experts(net, WINDOWS)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    second = probe_experts(net, WINDOWS)
    assert all(torch.equal(first[k].nan_to_num(-1), second[k].nan_to_num(-1)) for k in first)


def test_changes_nothing_after_an_error_either(monkeypatch):
    net = build().train()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(net.moe_layers()[1].experts, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe_experts(net, WINDOWS)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_model_without_experts_has_nothing_to_probe():
    net = build(1, num_experts=1, coupling="none")
    assert not any(isinstance(module, MoELayer) for module in net.modules())
    assert probe_experts(net, WINDOWS) == {}
    assert expert_summary({}) == {}


def test_summary_by_hand():
    nan = float("nan")
    cka = torch.tensor(
        [[[1, 0.2, nan], [0.2, 1, nan], [nan, nan, nan]], [[1, 0.1, 0.3], [0.1, 1, 0.5], [0.3, 0.5, 1]]]
    )
    layers = torch.tensor([1.0, 2.0])
    probe = {"final_cka": cka, "final_load": torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]])}
    probe |= {f"final_{name}": layers for name in ("specialisation", "routing_entropy", "mutual_information")}
    names = ("cka", "specialisation", "routing_entropy", "mutual_information")
    probe |= {f"final_{name}_random": layers / 2 for name in names}
    summary = expert_summary(probe)
    assert summary["cka"] == pytest.approx([0.2, 0.3])
    assert summary["max_violation"] == pytest.approx([0.5, 0.5])  # of 2 and of 3 live experts
    h = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert summary["load_entropy"] == pytest.approx([h, 1 / math.log2(3)])
    assert summary["specialisation"] == [1, 2] and summary["routing_entropy_random"] == [0.5, 1]


def test_summary_is_plain_json():
    summary = expert_summary(probe_experts(build(3, 2), WINDOWS))
    assert set(summary) == {
        "specialisation", "specialisation_random", "cka", "cka_random", "routing_entropy",
        "routing_entropy_random", "mutual_information", "mutual_information_random", "max_violation",
        "load_entropy",
    }  # fmt: skip
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert all(len(values) == 2 for values in summary.values())


def test_wrong_input():
    with pytest.raises(DataError, match="windows"):
        probe_experts(build(), WINDOWS[:0])
    with pytest.raises(ConfigError, match="max_tokens"):
        probe_experts(build(), WINDOWS, max_tokens=0)


@torch.no_grad()
def test_window_losses_are_sums_over_the_tokens_of_each_window(double):
    net = build().double()
    losses = window_losses(net, WINDOWS, batch_size=5)
    assert losses.shape == (12,) and losses.dtype == torch.float64
    ids = torch.from_numpy(WINDOWS)
    logits = net.eval()(ids[:, :-1]).logits
    for row in range(12):
        want = torch.nn.functional.cross_entropy(logits[row].float(), ids[row, 1:], reduction="sum")
        assert losses[row].item() == pytest.approx(want.item(), rel=1e-6)
    assert mean_loss(net, WINDOWS) == pytest.approx(losses.sum().item() / WINDOWS[:, 1:].size)


def test_mean_loss_leaves_the_mode_alone():
    net = build()
    assert mean_loss(net.train(), WINDOWS, batch_size=5) == pytest.approx(mean_loss(net.eval(), WINDOWS))
    assert not net.training
