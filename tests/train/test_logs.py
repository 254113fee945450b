from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_model import tiny_model

from graphmoe import metrics
from graphmoe.errors import ConfigError
from graphmoe.train.logs import RecordLog


def build(**options):
    defaults = {
        "num_experts_per_tok": 2,
        "coupling": "hyper",
    }
    return tiny_model(**{**defaults, **options})


def state(run_dir, step=0, *, main=True):
    (run_dir / "config.yaml").write_text("recipe: test\n")
    accelerator = SimpleNamespace(is_main_process=main, num_processes=1)
    return SimpleNamespace(step=step, run_dir=run_dir, accelerator=accelerator)


def outputs(net):
    return net(torch.randint(31, (2, 12)), output_records=True)


def record(log, net, at, steps):
    """Outputs of each recorded step."""
    seen = []
    for step in steps:
        at.step = step
        seen.append(outputs(net))
        log.on_step(at, net, seen[-1])
    return seen


def written(run_dir):
    return load_file(run_dir / "records.safetensors")


def test_rows_equal_the_metrics_of_each_layer(tmp_path):
    net, at, log = build(num_ghosts=2), state(tmp_path), RecordLog({"recipe": "test"})
    seen = record(log, net, at, (2, 4, 6))
    log.write(at, net)
    records = written(tmp_path)
    assert records["step"].tolist() == [2, 4, 6]
    for row, out in enumerate(seen):
        for layer, r in enumerate(out.records):
            # Four primaries serve, two ghosts sleep.
            want = metrics.specialisation(r.expert_mean[:4]).item()
            assert records["specialisation"][row, layer] == pytest.approx(want, rel=1e-5)
            want = metrics.routing_entropy(r.routing).item()
            assert records["routing_entropy"][row, layer] == pytest.approx(want, rel=1e-5)
            assert 1.5 < want <= 2.0001  # hardly decided, among four of six
    assert records["specialisation"].shape == records["routing_entropy"].shape == (3, 2)


def test_experts_that_served_nobody_do_not_count(tmp_path):
    net, at, log = build(num_experts_per_tok=2), state(tmp_path), RecordLog({})
    with torch.no_grad():
        for layer in net.moe_layers():
            layer.router.weight[3] = 0
            layer.router.weight[:3] = layer.router.weight[:1].abs()  # ties: the lowest ids win
    (out,) = record(log, net, at, (1,))
    for layer, r in enumerate(out.records):
        served = r.routing.ptr.diff() > 0
        assert not served.all() and served.sum() >= 2
        want = metrics.specialisation(r.expert_mean[served]).item()
        assert log.series["specialisation"][0][layer].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_dropped_edges_are_a_share_of_all_that_the_router_wanted(tmp_path, factor):
    net, at = build(coupling="none", capacity_factor=factor), state(tmp_path)
    log = RecordLog({})
    seen = record(log, net, at, (1, 2))
    for row, out in enumerate(seen):
        for layer, r in enumerate(out.records):
            want = int(r.overflow.sum()) / (2 * 12 * 2)
            assert log.series["drop_rate"][row][layer].item() == pytest.approx(want)
            assert (want == 0) == (factor == 4.0)
            kept = r.routing.ptr.diff().float()
            torch.testing.assert_close(log.series["load"][row][layer], kept / kept.sum())
    chance = metrics.random_drop_rate(24, 4, 2, factor)
    assert log.series["drop_rate_random"][-1].tolist() == pytest.approx([chance] * 2)
    want = torch.stack(log.series["drop_rate"])[-1:].mean(dim=0)
    assert log.summary()["drop_rate"] == want.tolist()
    assert {"drop_rate", "drop_rate_random"} < set(log.summary())


def test_without_a_capacity_there_is_no_drop_rate(tmp_path):
    log = RecordLog({})
    record(log, build(), state(tmp_path), (1,))
    assert "drop_rate" not in log.series and "drop_rate" not in log.summary()


def test_chance_of_a_drop_counts_live_experts_only(tmp_path):
    net, log = build(num_ghosts=2, coupling="none", capacity_factor=1.0), RecordLog({})
    record(log, net, state(tmp_path), (1,))
    want = metrics.random_drop_rate(24, 4, 2, 1.0)
    assert log.series["drop_rate_random"][0].tolist() == pytest.approx([want] * 2)


def test_gates_are_means_over_tokens(tmp_path):
    net, log = build(coupling="collab", fusion="gated"), RecordLog({})
    for layer in net.moe_layers():
        torch.nn.init.normal_(layer.fusion.gate.weight, std=1.0)
    (out,) = record(log, net, state(tmp_path), (1,))
    for layer, r in enumerate(out.records):
        assert log.series["mediator_gate"][0][layer].item() == pytest.approx(r.gate.mean().item())
        want = r.gate.std(correction=0).item()
        assert log.series["mediator_gate_std"][0][layer].item() == pytest.approx(want, rel=1e-5)
        assert want > 0.01
    assert "coupling" not in log.series  # attention is another for each token


def test_counts_are_those_of_all_ranks(tmp_path):
    """Two ranks with tokens of their own; what the other one sends is added to what a rank sends."""
    net = build(coupling="collab", fusion="gated", capacity_factor=1.0)
    both, sent = [outputs(net), outputs(net)], []
    at = [state(tmp_path, step=1, main=rank == 0) for rank in (0, 1)]

    def reduce_of(rank):
        def reduce(values, how):
            assert how == "sum"
            sent.append(values)
            return values + (sent[0] if rank == 0 else 0)

        return reduce

    logs = [RecordLog({}), RecordLog({})]
    for rank in (1, 0):
        at[rank].accelerator.num_processes, at[rank].accelerator.reduce = 2, reduce_of(rank)
        logs[rank].on_step(at[rank], net, both[rank])
    # The rank that does not write takes part, once, and sends as much.
    assert len(sent) == 2 and sent[0].shape == sent[1].shape
    for layer, pair in enumerate(zip(*(out.records for out in both), strict=True)):
        kept = sum(r.routing.ptr.diff() for r in pair).float()
        torch.testing.assert_close(logs[0].series["load"][0][layer], kept / kept.sum())
        assert not torch.allclose(logs[0].series["load"][0][layer], logs[1].series["load"][0][layer])
        dropped = sum(int(r.dropped) for r in pair)
        assert dropped > 0
        want = dropped / (dropped + kept.sum().item())
        assert logs[0].series["drop_rate"][0][layer].item() == pytest.approx(want)
        served = [r.gate[metrics.serving(r.routing).any(dim=1)] for r in pair]
        want = torch.cat(served)
        assert logs[0].series["mediator_gate"][0][layer].item() == pytest.approx(want.mean().item())
        got = logs[0].series["mediator_gate_std"][0][layer].item()
        assert got == pytest.approx(want.std(correction=0).item(), rel=1e-4)


def test_no_outputs_no_specialisation(tmp_path):
    net, at, log = build(coupling="none"), state(tmp_path), RecordLog({})
    record(log, net, at, (1,))
    traffic = {"load", "routing_entropy", "edges_per_token", "step_max_violation"}
    assert set(log.series) == {"step", "step_max_violation_random"} | traffic


def test_violations_of_single_steps_beside_their_floor(tmp_path):
    net, at, log = build(coupling="none"), state(tmp_path), RecordLog({})
    seen = record(log, net, at, (1, 2, 150))
    want = []
    for out in seen:
        served = [r.routing.ptr.diff().double() for r in out.records]
        want.append([float(s.max() / s.mean() - 1) for s in served])
    torch.testing.assert_close(torch.stack(log.series["step_max_violation"]), torch.tensor(want))
    summary = log.summary()
    assert summary["step_max_violation"] == pytest.approx(want[-1])  # the others are more than 100 steps old
    assert summary["step_max_violation_random"] == pytest.approx([metrics.random_max_violation(24, 4, 2)] * 2)
    assert log.series["edges_per_token"][0].tolist() == [2.0, 2.0]
    assert "edges_per_token" not in summary  # every token has as many
    assert RecordLog({}).summary() == {}


@pytest.mark.parametrize("output, weight, want", [(0.2, 0.05, 0.1), (0.0, 0.05, 0.025), (0.0, 0.0, None)])
def test_strength_is_the_effective_coefficient(tmp_path, output, weight, want):
    net = build(orthogonality_output_coef=output, orthogonality_weight_coef=weight)
    net.orthogonality_strength.copy_(torch.tensor([0.5, 1.0]))
    at, log = state(tmp_path), RecordLog({})
    record(log, net, at, (1,))
    if want is None:
        assert "orthogonality_strength" not in log.series
    else:
        assert log.series["orthogonality_strength"][0].tolist() == pytest.approx([want, 2 * want])


def test_extras_join_every_row(tmp_path):
    net, at = build(), state(tmp_path)

    def rate(at, model):
        assert model is net
        return {"ghost_learning_rate": torch.full((2, 1), at.step / 10)}

    log = RecordLog({}, extras=[rate, lambda at, model: {}])
    record(log, net, at, (1, 2))
    log.write(at, net)
    np.testing.assert_allclose(written(tmp_path)["ghost_learning_rate"], [[[0.1], [0.1]], [[0.2], [0.2]]])


def test_final_arrays_lie_beside_the_series_and_are_not_resumed_as_such(tmp_path):
    net, at, log = build(), state(tmp_path), RecordLog({"recipe": "test"})
    record(log, net, at, (2, 4, 6))
    # As many layers, or experts, as steps: only the name tells.
    final = {"final_load": torch.rand(3, 4), "final_cka": torch.full((3, 4, 4), float("nan"))}
    log.write(at, net, final=final)
    whole = written(tmp_path)
    assert np.array_equal(whole["final_load"], final["final_load"].numpy())
    assert whole["final_cka"].shape == (3, 4, 4) and whole["incidence"].shape == (2, 12)

    resumed, at = RecordLog({"recipe": "test"}), state(tmp_path, step=4)
    resumed.on_start(at, net)
    assert set(resumed.series) == set(whole) - {"final_load", "final_cka", "incidence"}
    assert all(len(rows) == 2 for rows in resumed.series.values())
    record(resumed, net, at, (6, 8))
    resumed.write(at, net, final={"final_load": final["final_load"] + 1})
    again = written(tmp_path)
    assert again["step"].tolist() == [2, 4, 6, 8]
    for name in set(resumed.series) - {"step"}:
        assert np.array_equal(again[name][:2], whole[name][:2]), name
    assert np.array_equal(again["final_load"], final["final_load"].numpy() + 1)
    assert "final_cka" not in again  # of another model than the one that is described now


def test_a_finished_run_resumed_at_its_end_keeps_its_series(tmp_path):
    net, at, log = build(), state(tmp_path), RecordLog({})
    record(log, net, at, (2, 4))
    log.write(at, net, final={"final_load": torch.rand(2, 4)})
    before = written(tmp_path)
    again = RecordLog({})
    again.on_start(state(tmp_path, step=4), net)
    again.write(at, net, final={"final_load": torch.from_numpy(before["final_load"])})
    after = written(tmp_path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_only_the_main_rank_writes(tmp_path):
    net, at, log = build(), state(tmp_path, main=False), RecordLog({})
    record(log, net, at, (2,))
    log.write(at, net)
    assert not (tmp_path / "records.safetensors").exists()


def test_a_static_array_must_not_look_like_a_series(tmp_path):
    net, at, log = build(), state(tmp_path), RecordLog({})
    record(log, net, at, (2,))
    with pytest.raises(ConfigError, match=r"final: array without steps.*got 'load'"):
        log.write(at, net, final={"load": torch.rand(2, 4)})


def test_a_dense_model_has_no_records(tmp_path):
    net, at, log = (
        build(num_experts=1, num_experts_per_tok=1, coupling="none"),
        state(tmp_path),
        RecordLog({}),
    )
    record(log, net, at, (2,))
    log.write(at, net, final={})
    assert not (tmp_path / "records.safetensors").exists()
