import io
import json
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_model import tiny_model

from graphmoe import checkpoint
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, Stopped
from graphmoe.train.evaluate import mean_loss
from graphmoe.train.logs import MetricsLog, RecordLog
from graphmoe.train.loop import Callback, Every, NonFiniteError, fit, reseed
from graphmoe.train.optim import decay_groups
from graphmoe.train.orthogonality import OrthogonalityWarmup


def model(**options):
    reseed(0, 0)
    defaults = {
        "num_experts_per_tok": 3,
        "coupling": "hyper",
        "num_ghosts": 2,
        "ghost_window": 3,
        "ghost_rate": 0.25,
        "dropout": 0.1,
        "orthogonality_output_coef": 0.1,
        "orthogonality_weight_coef": 0.05,
    }
    return tiny_model(**{**defaults, **options})


def batches(index, size, slots):
    ids = np.random.default_rng([7, index]).integers(0, 31, (size, 12))[slots]
    ids = torch.from_numpy(ids)
    return {"input_ids": ids, "labels": ids, "output_records": True}


def config(**options):
    return RunConfig(
        **{
            "max_steps": 12,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 3,
            "device": "cpu",
            "num_threads": 1,
            **options,
        }
    )


class Losses(Callback):
    def __init__(self):
        self.seen = {}

    def on_step(self, state, model, outputs):
        self.seen[state.step] = (float.hex(state.metrics["loss"]), float.hex(state.metrics["grad_norm"]))


def train(run_dir, *, net=None, extra=(), resume_from=None, save_every=4, **options):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("recipe: test\n")
    net = net or model()
    losses, ghosts = Losses(), on.GhostActivation(net)
    records, log = RecordLog({"recipe": "test"}), MetricsLog(run_dir)
    hooks = [ghosts, OrthogonalityWarmup(8), Every(2, records), Every(2, log), losses, *extra,
             Every(save_every, on.Save(records=records))]  # fmt: skip
    try:
        fit(
            net,
            batches,
            config(**options),
            run_dir,
            callbacks=hooks,
            setup=ghosts.setup,
            resume_from=resume_from,
        )
    except Stopped as stop:
        losses.stopped = stop.signum
    return net, losses


class Interrupt(Callback):
    def __init__(self, step, signum=signal.SIGINT):
        self.step, self.signum = step, signum

    def on_step(self, state, model, outputs):
        if state.step == self.step:
            os.kill(os.getpid(), self.signum)


def assert_equal_models(a, b):
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("cut", [1, 5, 7, 10])
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2},
                                     {"optimizer": "sgd", "max_grad_norm": 0.5}], ids=str)  # fmt: skip
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, cut, options):
    whole, all_losses = train(tmp_path / "whole", **options)
    _, first = train(tmp_path / "cut", extra=[Interrupt(cut)], **options)
    assert first.stopped == signal.SIGINT
    step_dir = checkpoint.latest(tmp_path / "cut")
    assert checkpoint.read_json(step_dir / "state.json")["step"] == cut + 1  # the step in hand is finished
    resumed, rest = train(tmp_path / "cut", net=model(), resume_from=step_dir, **options)
    assert first.seen | rest.seen == all_losses.seen
    assert set(rest.seen) == set(range(cut + 2, 13))
    assert_equal_models(whole, resumed)
    a, b = (load_file(tmp_path / d / "records.safetensors") for d in ("whole", "cut"))
    kept = np.isin(b["step"], a["step"])
    for key in a:
        assert np.array_equal(a[key], b[key][kept] if key != "incidence" else b[key]), key


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    _, losses = train(tmp_path / "run", extra=[Interrupt(5, signal.SIGTERM)])
    assert losses.stopped == signal.SIGTERM
    assert checkpoint.latest(tmp_path / "run").name == "step-00000006"
    assert max(losses.seen) == 6


def test_ghosts_wake_and_learn_on_their_way(tmp_path):
    train(tmp_path / "run", max_steps=14)
    records = checkpoint.read(tmp_path / "run").records
    phase = records["ghost_phase"][:, 0, 0]
    assert set(phase) == {0, 1, 2} and (np.diff(phase) >= 0).all()
    level = records["ghost_level"][:, 0, 0]
    assert level[0] == 0 and level[-1] == 1
    assert records["load"].shape == (7, 2, 6)
    np.testing.assert_allclose(records["load"].sum(-1), 1, rtol=1e-5)
    assert (records["load"][0, :, 4:] == 0).all() and records["load"][-1, 0, 4] > 0
    assert (records["coupling"][0][:, :, 4:] == 0).all() and (records["coupling"][-1, 0, :, 4] > 0).any()
    assert records["overlap"].shape == (7, 2)


def test_a_dormant_ghost_keeps_its_weights_and_moments(tmp_path):
    net = model(ghost_activation_threshold=1e9)
    start = [p.detach().clone() for layer in net.moe_layers() for p in layer.ghost_slices()]
    train(tmp_path / "run", net=net)
    now = [p for layer in net.moe_layers() for p in layer.ghost_slices()]
    for before, after in zip(start, now, strict=True):
        assert torch.equal(before[4:], after[4:])
        assert not torch.equal(before[:4], after[:4])


def test_callbacks_are_called_as_often_as_they_should(tmp_path):
    class Count(Callback):
        def __init__(self):
            self.calls = []

        def on_start(self, state, model):
            self.calls.append("start")

        def on_step(self, state, model, outputs):
            self.calls.append(state.step)

        def on_end(self, state, model):
            self.calls.append("end")

    every, rare, quiet = Count(), Count(), Count()
    hooks = [every, Every(4, rare), Every(5, quiet, last=False)]
    fit(model(), batches, config(max_steps=6), tmp_path, callbacks=hooks)
    assert every.calls == ["start", 1, 2, 3, 4, 5, 6, "end"]
    assert rare.calls == ["start", 4, 6, "end"]
    assert quiet.calls == ["start", 5, "end"]


def test_learning_rate_follows_the_schedule(tmp_path):
    rates = []

    class Rates(Callback):
        def on_step(self, state, model, outputs):
            rates.append(state.metrics["lr"])

    fit(
        model(),
        batches,
        config(max_steps=8, warmup_steps=4, lr_scheduler_type="linear"),
        tmp_path,
        callbacks=[Rates()],
    )
    np.testing.assert_allclose(rates, [0, 0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025])


def test_a_non_finite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    net = model()
    start = None

    class Poison(Callback):
        def on_step(self, state, model, outputs):
            nonlocal start
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            if state.step == 2:
                model.model.layers[1].feed_forward.experts.down_proj.register_hook(lambda g: g * float("nan"))

    with pytest.raises(
        NonFiniteError, match=r"step 3, first seen in model\.layers\.1\.feed_forward\.experts\.down_proj"
    ):
        fit(net, batches, config(), tmp_path, callbacks=[Poison()])
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, start[name]), name


def test_accumulation_equals_one_large_batch(tmp_path, double):
    def halves(index, size, slots):
        whole = batches(index // 2, 2 * size, slice(None))
        part = slice(0, size) if index % 2 == 0 else slice(size, 2 * size)
        return {k: v[part] if torch.is_tensor(v) else v for k, v in whole.items()}

    options = {"num_ghosts": 0, "dropout": 0.0, "router_aux_loss_coef": 0.0, "orthogonality_output_coef": 0.0}
    nets = model(**options).double(), model(**options).double()
    large = config(batch_size=8, max_steps=3, max_grad_norm=float("inf"))
    small = config(batch_size=4, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=float("inf"))
    fit(nets[0], batches, large, tmp_path)
    fit(nets[1], halves, small, tmp_path)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_compiled_model_trains_alike(tmp_path, monkeypatch):
    options = {"num_ghosts": 0, "coupling": "none", "num_hidden_layers": 1}
    nets, calls = (model(**options), model(**options)), []
    whole_compile = torch.compile

    def quick_compile(net, options):
        calls.append(options["fallback_random"])
        return whole_compile(net, backend="aot_eager")  # all but the generation of code

    monkeypatch.setattr(torch, "compile", quick_compile)
    for net, flag in zip(nets, (False, True), strict=True):
        fit(net, batches, config(max_steps=3, compile_model=flag), tmp_path)
    assert calls == [True]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_compiler_itself_gets_the_gradients_right(tmp_path):
    options = {"coupling": "none", "num_ghosts": 0, "dropout": 0.0}
    nets = model(**options), model(**options)
    fit(nets[0], batches, config(max_steps=3), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "model cannot be compiled")
        fit(nets[1], batches, config(max_steps=3, compile_model=True), tmp_path)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def fails(**batch):
    torch.rand(7)  # noise that the step must not miss
    raise RuntimeError("no\ncompiler")


def halves(net):
    def forward(**batch):
        outputs = net(**batch)
        outputs.loss = outputs.loss / 2
        return outputs

    return forward


@pytest.mark.parametrize(
    "program, reason",
    [
        (lambda net: fails, "RuntimeError: no compiler"),
        (halves, r"the gradient of model\.embed_tokens\.weight is off by 0\.5 of its norm"),
    ],
    ids=["fails", "wrong"],
)
def test_what_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch, program, reason):
    nets = model(), model()
    fit(nets[0], batches, config(max_steps=3), tmp_path)
    monkeypatch.setattr(torch, "compile", lambda net, options: program(net))
    with pytest.warns(UserWarning, match=f"cannot be compiled and runs as it is: {reason}"):
        fit(nets[1], batches, config(max_steps=3, compile_model=True), tmp_path)
    assert_equal_models(*nets)


def test_the_betas_are_those_of_the_flags(tmp_path):
    seen = []
    fit(
        model(), batches, config(max_steps=1, adam_beta1=0.5, adam_beta2=0.75), tmp_path,
        setup=lambda optimizer: seen.extend(group["betas"] for group in optimizer.param_groups),
    )  # fmt: skip
    assert seen == [(0.5, 0.75)] * 2


def test_sgd_is_that_of_torch(tmp_path):
    nets, rates = (model(dropout=0.0), model(dropout=0.0)), []
    options = {"optimizer": "sgd", "momentum": 0.8, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    fit(
        nets[0], batches, config(max_steps=3, warmup_steps=0, max_grad_norm=1e9, **options), tmp_path,
        setup=lambda optimizer: rates.extend(group["weight_decay"] for group in optimizer.param_groups),
    )  # fmt: skip
    assert rates == [0.1, 0.0]
    decayed, others = decay_groups(nets[1], 0.1)
    optimizer = torch.optim.SGD([decayed, others], lr=1e-2, momentum=0.8)
    for step in range(3):
        optimizer.zero_grad()
        nets[1].train()(**batches(step, 4, slice(0, 4))).loss.backward()
        optimizer.step()
    for name, value in nets[0].state_dict().items():
        torch.testing.assert_close(value, nets[1].state_dict()[name], msg=name)


def test_metrics_and_plain_progress(tmp_path):
    stream = io.StringIO()
    windows = np.random.default_rng(0).integers(0, 31, (5, 9))
    log = MetricsLog(tmp_path)
    check = on.Evaluate(lambda m: {"loss": mean_loss(m, windows, batch_size=2), "bits_per_byte": 2.5}, log)
    hooks = [Every(2, log), Every(3, check), on.Progress(every=3, pause=0, evaluation=check, stream=stream)]
    net = model()
    fit(net, batches, config(max_steps=6), tmp_path, callbacks=hooks)
    assert net.training
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6)
    ]  # fmt: skip
    assert set(lines[0]["aux"]) == {"balance", "router_z", "orthogonality_output", "orthogonality_weight"}
    printed = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in printed] == ["step 1/6", "step 3/6", "step 6/6"]
    assert "held-out bits/byte 2.500" in printed[1] and "s left" in printed[1]


def test_quick_steps_do_not_fill_a_log(tmp_path):
    stream = io.StringIO()
    fit(model(), batches, config(max_steps=6), tmp_path, callbacks=[on.Progress(every=2, stream=stream)])
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["step 1/6", "step 6/6"]


def test_mean_loss_by_hand():
    net = model(dropout=0.0).eval()
    windows = np.random.default_rng(0).integers(0, 31, (5, 9))
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        out = net(ids, labels=ids).lm_loss.item()
    assert mean_loss(net, windows, batch_size=2) == pytest.approx(out, rel=1e-6)
    assert not net.training


def test_a_step_is_seeded_as_torch_does():
    reseed(3, 5, rank=1)
    drawn = torch.rand(4)
    torch.manual_seed(int(np.random.SeedSequence([3, 5, 1]).generate_state(1)[0]))
    assert torch.equal(drawn, torch.rand(4))
