import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_model import tiny_model
from transformers import AutoModelForCausalLM

from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.loss import orthogonality
from graphmoe.metrics import random_specialisation, specialisation
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig
from graphmoe.train.logs import RecordLog
from graphmoe.train.loop import Callback, Every, fit, reseed
from graphmoe.train.orthogonality import (
    SCHEDULES,
    AdaptiveOrthogonality,
    OrthogonalityWarmup,
    relative_specialisation,
)


def build(**options):
    reseed(0, 0)
    defaults = {
        "num_experts_per_tok": 2,
        "orthogonality_output_coef": 0.1,
        "orthogonality_adaptive": True,
        "orthogonality_interval": 4,
    }
    return tiny_model(**{**defaults, **options})


def batches(index, size, slots):
    ids = np.random.default_rng([7, index]).integers(0, 31, (size, 12))[slots]
    ids = torch.from_numpy(ids)
    return {"input_ids": ids, "labels": ids, "output_records": True}


class Strengths(Callback):
    """Strength, factor and loss of each step, bit for bit."""

    def __init__(self):
        self.seen = {}

    def on_step(self, state, model, outputs):
        exact = [float.hex(v) for v in model.orthogonality().tolist() + model.orthogonality_strength.tolist()]
        self.seen[state.step] = (*exact, float.hex(state.metrics["loss"]))


def train(run_dir, net, *, until=14, schedule="cosine", warmup_steps=0, resume_from=None, save=None):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("recipe: test\n")
    config = RunConfig(
        max_steps=until,
        batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        device="cpu",
        num_threads=1,
    )
    adaptive = AdaptiveOrthogonality(schedule, max_steps=14, warmup_steps=warmup_steps)
    strengths, records = Strengths(), RecordLog({})
    hooks = [adaptive, records, strengths]
    if save is not None:
        hooks.append(Every(save, on.Save(records=records)))
    fit(net, batches, config, run_dir, callbacks=hooks, resume_from=resume_from)
    return strengths.seen, records


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("exponential", [1, math.exp(-1.25), math.exp(-2.5), math.exp(-3.75), math.exp(-5)]),
        ("step", [1, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_time_by_hand(schedule, values):
    plain = AdaptiveOrthogonality(schedule, max_steps=100)
    assert [plain.time(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(values, abs=1e-12)
    warm = AdaptiveOrthogonality(schedule, max_steps=100, warmup_steps=50)
    assert [warm.time(step) for step in (0, 25, 50, 75)] == pytest.approx([0, 0.5 * values[1], *values[2:4]])


def final_strength(schedule, value, steps=400):
    """Strength of two layers after training on a constant specialisation."""
    net = build(orthogonality_interval=50)
    adaptive = AdaptiveOrthogonality(schedule, max_steps=steps)
    for step in range(1, steps + 1):
        net.orthogonality.observe(torch.full((2,), value), adaptive.time(step))
    return net.orthogonality()


def test_orthogonal_experts_let_the_strength_decay_to_its_floor():
    eye = torch.eye(4, 64), torch.ones(4)
    value = relative_specialisation([eye]).item()
    assert value == pytest.approx(1, abs=0.05)
    floor = torch.full((2,), 1e-3)
    for schedule in ("cosine", "linear", "exponential"):
        assert torch.equal(final_strength(schedule, value), floor), schedule
    torch.testing.assert_close(final_strength("constant", value), 0.7 * torch.tensor([0.1, 0.08]))
    # Halved four times only, it ends above the floor.
    torch.testing.assert_close(final_strength("step", value), 0.7 * torch.tensor([0.1, 0.08]) / 16)


def test_relative_specialisation_by_hand():
    mean = torch.randn(5, 16)
    rows = torch.tensor([3, 1, 0, 2, 0])
    want = specialisation(mean[rows > 0]) / random_specialisation(3, 16)
    got = relative_specialisation(
        [(mean, rows), (mean, torch.ones(5)), (mean, torch.tensor([9, 0, 0, 0, 0]))]
    )
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(got[1], specialisation(mean) / random_specialisation(5, 16))
    assert got[2] == 0  # a router that sends everything to one expert has specialised nobody


def test_a_random_layer_is_at_one():
    values = [relative_specialisation([(torch.randn(6, 128), torch.ones(6))]).item() for _ in range(20)]
    assert np.mean(values) == pytest.approx(1, abs=0.01) and np.std(values) < 0.05


def test_means_of_ranks_are_weighted_by_their_rows():
    """What the other rank adds comes from here, in the order in which it is asked for."""
    means = [torch.randn(3, 8), torch.randn(3, 8)]
    rows = [torch.tensor([4, 0, 2]), torch.tensor([1, 0, 6])]
    others = iter([means[1] * rows[1].unsqueeze(1), rows[1]])

    def reduce(tensor, reduction):
        assert reduction == "sum"
        return tensor + next(others)

    state = SimpleNamespace(step=1, accelerator=SimpleNamespace(num_processes=2, reduce=reduce))
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), rows[0].cumsum(0)])
    record = SimpleNamespace(expert_mean=means[0], routing=SimpleNamespace(ptr=ptr))
    net = build(num_hidden_layers=1, orthogonality_interval=1, orthogonality_target=0.5)
    AdaptiveOrthogonality("constant", max_steps=9).on_step(state, net, SimpleNamespace(records=[record]))
    served = rows[0] + rows[1]
    total = sum(mean * weight.unsqueeze(1) for mean, weight in zip(means, rows, strict=True))
    want = relative_specialisation([(total / served.unsqueeze(1).clamp(min=1), served)])
    assert 0 < want < 1.5
    assert torch.equal(net.orthogonality.previous, want)


def test_the_loss_has_the_strength_as_its_coefficient(tmp_path):
    net = build(orthogonality_output_coef=0.2, orthogonality_weight_coef=0.05, dropout=0.0)
    train(tmp_path / "run", net)
    strength = net.orthogonality()
    assert strength.tolist() != pytest.approx([0.2, 0.16])  # it has moved
    torch.testing.assert_close(net.orthogonality_strength * 0.2, strength)
    ids = torch.randint(31, (2, 9))
    with_strength = net(ids, labels=ids)
    net.orthogonality_strength.fill_(1)
    net.config.router_aux_loss_coef = net.config.router_z_loss_coef = 0.0
    out = net(ids, labels=ids, output_records=True)
    values = torch.stack([orthogonality(r.expert_mean) for r in out.records])
    got = 0.2 * with_strength.aux_losses["orthogonality_output"]
    torch.testing.assert_close(got, (strength * values).mean())


def test_weights_are_the_target_where_outputs_have_no_coefficient(tmp_path):
    net = build(orthogonality_output_coef=0.0, orthogonality_weight_coef=0.05)
    assert net.orthogonality.base == 0.05
    _, records = train(tmp_path / "run", net)
    torch.testing.assert_close(net.orthogonality_strength * 0.05, net.orthogonality())
    # The records hold the effective coefficient.
    torch.testing.assert_close(records.series["orthogonality_strength"][-1], net.orthogonality())


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_stopped_in_an_interval_and_resumed_equals_uninterrupted(tmp_path, cut):
    options = {"schedule": "cosine", "warmup_steps": 5}
    whole, _ = train(tmp_path / "whole", build(), **options)
    first, _ = train(tmp_path / "cut", build(), until=cut, save=cut, **options)
    step_dir = checkpoint.latest(tmp_path / "cut")
    net = build()
    rest, _ = train(tmp_path / "cut", net, resume_from=step_dir, **options)
    assert first | rest == whole
    assert len({seen[:2] for seen in whole.values()}) >= 3  # it has moved
    assert net.orthogonality.observed == 14


def test_overlapping_experts_raise_the_strength_and_are_driven_apart(tmp_path):
    """Beside a control, whose coefficient is too small to act."""
    different, relative = {}, {}
    for base in (0.3, 1e-9):
        net = build(
            orthogonality_output_coef=base,
            orthogonality_min=base / 100,
            orthogonality_max=1.0,
            num_experts_per_tok=4,
        )
        with torch.no_grad():
            for layer in net.moe_layers():
                for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
                    weight.copy_(weight[:1] + 0.05 * weight)
        _, records = train(tmp_path / str(base), net, schedule="constant", until=12)
        different[base] = torch.stack(records.series["specialisation"]).mean(dim=1)
        relative[base] = torch.stack(records.series["orthogonality_strength"])[3::4, 0] / base
    assert different[0.3][0] < 0.05 and different[0.3][-1] > 0.4
    assert different[1e-9].max() < 0.1
    torch.testing.assert_close(relative[0.3], torch.tensor([1.5, 0.7, 0.7]))
    torch.testing.assert_close(relative[1e-9], torch.tensor([1.5, 1.5, 1.5]))


def test_state_is_saved_and_loaded_with_the_model(tmp_path):
    net = build()
    train(tmp_path / "run", net, until=6)
    net.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in net.orthogonality.state_dict().items():
        assert torch.equal(value, loaded.orthogonality.state_dict()[name]), name
    assert net.orthogonality.observed == 6


def test_a_static_model_loaded_as_adaptive_starts_afresh(tmp_path):
    build(orthogonality_adaptive=False).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, orthogonality_adaptive=True)
    for name, value in build().orthogonality.state_dict().items():
        assert torch.equal(value, loaded.orthogonality.state_dict()[name]), name


def test_warmup_by_hand():
    net, warmup = build(orthogonality_adaptive=False), OrthogonalityWarmup(8)
    assert net.orthogonality is None and "orthogonality.strength" not in net.state_dict()
    for step, want in ((0, 0), (2, 0.25), (8, 1), (20, 1)):
        warmup.on_step(SimpleNamespace(step=step), net, None)
        assert net.orthogonality_strength.tolist() == [want] * 2


@pytest.mark.parametrize("adaptive", [False, True])
def test_outputs_are_tracked_where_they_are_needed(adaptive):
    net = build(orthogonality_output_coef=0.0, orthogonality_weight_coef=0.1, orthogonality_adaptive=adaptive)
    assert [layer.track_outputs for layer in net.moe_layers()] == [adaptive] * 2


@pytest.mark.parametrize(
    "options, match",
    [
        ({"orthogonality_output_coef": 0.0}, "orthogonality_adaptive"),
        ({"orthogonality_output_coef": -0.1}, "orthogonality_output_coef"),
        ({"orthogonality_weight_coef": -0.1}, "orthogonality_weight_coef"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef"),
        ({"orthogonality_interval": 0}, "orthogonality_interval"),
        ({"orthogonality_decay": 1.5}, "orthogonality_decay"),
        ({"orthogonality_target": 0.0}, "orthogonality_target"),
        ({"orthogonality_min": 0.0}, "orthogonality_min"),
        ({"orthogonality_max": 1e-4}, "orthogonality_max"),
    ],
)
def test_wrong_config(options, match):
    with pytest.raises(ConfigError, match=match):
        build(**options)


def test_wrong_input():
    with pytest.raises(ConfigError, match=r"orthogonality_schedule: unknown schedule; did you mean cosine"):
        AdaptiveOrthogonality("cosinus", max_steps=9)
    assert "constant" in SCHEDULES
    with pytest.raises(ConfigError, match="orthogonality_adaptive"):
        AdaptiveOrthogonality("cosine", max_steps=9).on_start(None, build(orthogonality_adaptive=False))
