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


def test_no_outputs_no_specialisation(tmp_path):
    net, at, log = build(coupling="none"), state(tmp_path), RecordLog({})
    record(log, net, at, (1,))
    assert set(log.series) == {"step", "load", "routing_entropy"}


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
