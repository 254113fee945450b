"""Ghosts through whole runs: their rates, stopping and resuming, evaluation, more than one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model

from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, Stopped
from graphmoe.train.evaluate import mean_loss
from graphmoe.train.logs import MetricsLog
from graphmoe.train.loop import Callback, Every, NonFiniteError, fit, reseed
from graphmoe.train.optim import ghost_learning_rate

TESTS = str(Path(__file__).parents[1])
POLICIES = ("level", "inverse", "complementary")


def model(**options):
    reseed(0, 0)
    defaults = {
        "num_experts_per_tok": 3,
        "coupling": "hyper",
        "num_ghosts": 2,
        "ghost_window": 3,
        "ghost_rate": 0.25,
    }
    return tiny_model(**{**defaults, **options})


def batches(index, size, slots):
    ids = torch.from_numpy(np.random.default_rng([7, index]).integers(0, 31, (size, 12))[slots])
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


class Watch(Callback):
    """Loss, phases, levels and rates of ghosts after each step."""

    def __init__(self, ghosts):
        self.ghosts, self.steps = ghosts, {}

    def on_step(self, state, model, outputs):
        gates = [layer.ghosts for layer in model.moe_layers()]
        self.steps[state.step] = {
            "loss": float.hex(state.metrics["loss"]),
            "lr": state.metrics["lr"],
            "phase": [gate.phase.tolist() for gate in gates],
            "level": [gate()[-2:].tolist() for gate in gates],
            "saturation": [gate.saturation().item() for gate in gates],
            "rate": self.ghosts.figures(state, model)["ghost_learning_rate"].tolist(),
        }


class At(Callback):
    """Calls a function at one step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step(self, state, model, outputs):
        if state.step == self.step:
            self.function(model)


def train(run_dir, *hooks, net=None, policy="level", resume_from=None, **options):
    """A short run with ghosts; returns the model and what :class:`Watch` saw."""
    run_dir.mkdir(exist_ok=True)
    net = net or model(dropout=0.1)
    ghosts = on.GhostActivation(net, learning_rate=policy, peak=1e-2, ghost_peak=5e-3)
    watch = Watch(ghosts)
    hooks = [ghosts, watch, *hooks]
    with suppress(Stopped):
        fit(
            net,
            batches,
            config(**options),
            run_dir,
            callbacks=hooks,
            setup=ghosts.setup,
            resume_from=resume_from,
        )
    return net, watch.steps


def assert_equal_models(a, b):
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def interrupt(model):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("policy", POLICIES)
def test_rates_are_those_of_the_policy_and_the_level_in_the_step(tmp_path, policy):
    _, steps = train(tmp_path, policy=policy, max_steps=14)
    level = torch.zeros(2, 2)  # [L, G]
    for step in steps.values():
        expected = ghost_learning_rate(policy, step["lr"], 1e-2, 5e-3, level)
        assert torch.equal(torch.tensor(step["rate"]), expected)
        level = torch.tensor(step["level"])
    assert steps[1]["rate"] == [[0, 0], [0, 0]]
    assert all(0 < rate < 1e-2 for rate, _ in steps[8]["rate"])


def test_policies_part_where_a_ghost_first_learns(tmp_path):
    runs = [train(tmp_path / policy, policy=policy)[1] for policy in POLICIES]
    first = next(n for n, step in runs[0].items() if step["rate"] != [[0, 0], [0, 0]])
    losses = [[step["loss"] for step in run.values()] for run in runs]
    # The step itself, its loss included, is still that of equal weights.
    assert losses[0][:first] == losses[1][:first] == losses[2][:first]
    assert len({run[-1] for run in losses}) == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_dormant_ghost_stays_where_it_is(tmp_path, policy):
    net = model(ghost_activation_threshold=1e9)
    start = [p.detach().clone() for layer in net.moe_layers() for p in layer.ghost_slices()]
    train(tmp_path, net=net, policy=policy, weight_decay=0.5, max_steps=6)
    for before, after in zip(
        start, (p for layer in net.moe_layers() for p in layer.ghost_slices()), strict=True
    ):
        assert torch.equal(before[4:], after[4:])
        assert not torch.equal(before[:4], after[:4])


@pytest.mark.parametrize("policy", POLICIES)
def test_stopped_in_the_middle_of_an_activation(tmp_path, policy):
    whole, all_steps = train(tmp_path / "whole", policy=policy)
    _, first = train(tmp_path / "cut", At(4, interrupt), Every(100, on.Save()), policy=policy)
    assert list(first) == [1, 2, 3, 4, 5]
    assert [level for level, _ in first[5]["level"]] == [0.5, 0.5]
    step_dir = checkpoint.latest(tmp_path / "cut")
    resumed, rest = train(tmp_path / "cut", net=model(dropout=0.1), policy=policy, resume_from=step_dir)
    assert first | rest == all_steps
    assert_equal_models(whole, resumed)


def test_evaluation_never_moves_a_ghost(tmp_path):
    windows = np.random.default_rng(0).integers(0, 31, (5, 9))
    prompt = torch.from_numpy(windows[:1])

    def score(net):
        net.generate(prompt, max_new_tokens=3, do_sample=True, pad_token_id=0)
        net(prompt, labels=prompt, output_records=True)
        return {"loss": mean_loss(net, windows, batch_size=2)}

    evaluate = on.Evaluate(score, MetricsLog(tmp_path))
    plain, _ = train(tmp_path, max_steps=6)
    watched, steps = train(tmp_path, evaluate, max_steps=6)
    assert 0 < steps[6]["level"][0][0] < 1
    assert_equal_models(plain, watched)
    before = {name: buffer.clone() for name, buffer in watched.named_buffers()}
    for mode in (watched.eval(), watched.train()):
        mode(prompt, labels=prompt, output_records=True).loss.backward()
    with torch.no_grad():
        score(watched.eval())
    for name, buffer in watched.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_no_figures_without_ghosts_or_before_a_step():
    net = model(num_ghosts=0)
    ghosts = on.GhostActivation(net, learning_rate="inverse", peak=1e-2)
    ghosts.setup(torch.optim.SGD(net.parameters(), lr=0.1))  # a model without ghosts needs no scales
    assert ghosts.figures(None, net) == {}
    assert on.GhostActivation(model()).figures(None, net) == {}


def test_the_own_rate_of_ghosts_is_the_peak_unless_given():
    net, scales = model(), []
    for options in ({}, {"ghost_peak": 1e-2}, {"ghost_peak": 5e-3}):
        ghosts = on.GhostActivation(net, learning_rate="inverse", peak=1e-2, **options)
        scales.append(ghosts.scale(lr=5e-3, level=torch.ones(1)).item())
    assert scales == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"learning_rate": "linear", "peak": 1e-2}, "ghost_lr_schedule: unknown.*got 'linear'"),
        ({"learning_rate": "inverse", "peak": 1e-2, "ghost_peak": -1.0}, "ghost_learning_rate: .*got -1.0"),
        ({"ghost_peak": float("nan")}, "ghost_learning_rate: .*got nan"),
        ({"learning_rate": "inverse"}, "learning_rate: .*relative to a peak; expected finite, > 0$"),
    ],
    ids=str,
)
def test_wrong_input(options, match):
    with pytest.raises(ConfigError, match=match):
        on.GhostActivation(model(), **options)


def halved_batches(index, size, slots):
    """The rows of one half have other tokens than those of the other, and so have the ranks."""
    rng = np.random.default_rng([11, index])
    ids = np.concatenate([rng.integers(0, 18, (size // 2, 12)), rng.integers(13, 31, (size // 2, 12))])
    ids = torch.from_numpy(ids[slots])
    return {"input_ids": ids, "labels": ids, "output_records": True}


def whole_run(run_dir):
    """The run that one process and two do alike: nothing in it depends on the split of the batch."""
    net = model(dropout=0.0, router_aux_loss_coef=0.0, ghost_activation_threshold=0.6, ghost_window=6)
    ghosts = on.GhostActivation(net, learning_rate="complementary", peak=1e-2)
    watch = Watch(ghosts)
    options = config(max_steps=14, batch_size=8)
    fit(net, halved_batches, options, run_dir, callbacks=[ghosts, watch], setup=ghosts.setup)
    return net, watch.steps


def stopped_run(run_dir, rank):
    """A signal reaches rank 1 only; a buffer is moved on each rank by itself."""
    net = model()
    hooks = [At(1, lambda m: m.orthogonality_strength.fill_(rank))]
    if rank == 1:
        hooks.append(At(3, lambda m: os.kill(os.getpid(), signal.SIGTERM)))
    last = []
    hooks.append(At(4, lambda m: last.append(4)))
    try:
        fit(net, batches, config(max_steps=9), run_dir, callbacks=hooks)
    except Stopped as stop:
        return {"signal": stop.signum, "reached": last, "buffer": net.orthogonality_strength.tolist()}


def refused_run(run_dir, rank):
    """The loss of rank 1 is infinite, its gradients are not."""
    net = model()
    if rank == 1:
        net.register_forward_hook(
            lambda module, args, output: setattr(output, "loss", output.loss + torch.inf)
        )
    try:
        fit(net, batches, config(), run_dir)
    except NonFiniteError as error:
        return str(error)


def uneven_run(run_dir):
    try:
        fit(model(), batches, config(batch_size=3), run_dir)
    except ConfigError as error:
        return str(error)


def one_rank(out):
    """What each of two processes does, and what it leaves in ``out``."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    net, steps = whole_run(out)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, out / f"{rank}.safetensors")
    found = {"steps": steps, "stopped": stopped_run(out, rank), "refused": refused_run(out, rank)}
    (out / f"{rank}.json").write_text(json.dumps(found | {"uneven": uneven_run(out)}))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes with gloo between them found, and their weights."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(out)],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": TESTS},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    return found, [load_file(out / f"{rank}.safetensors") for rank in (0, 1)]


def test_ranks_move_weights_and_ghosts_alike(two_ranks):
    found, weights = two_ranks
    assert found[0]["steps"] == found[1]["steps"]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert found[0]["steps"]["14"]["phase"][0][0] == 2  # one did wake and learn


def test_two_processes_wake_the_ghosts_that_one_wakes(two_ranks, tmp_path):
    found, weights = two_ranks
    net, steps = whole_run(tmp_path)
    for number, step in steps.items():
        other = found[0]["steps"][str(number)]
        for key in ("phase", "level", "rate"):
            assert step[key] == other[key], (number, key)
        assert float.fromhex(step["loss"]) == pytest.approx(float.fromhex(other["loss"]), abs=1e-5)
        np.testing.assert_allclose(step["saturation"], other["saturation"], rtol=1e-4)
    for name, value in net.named_parameters():
        torch.testing.assert_close(weights[0].get(name, value), value.detach(), rtol=0, atol=1e-5)
    for index, layer in enumerate(net.moe_layers()):
        for name in ("phase", "steps", "observed", "last_wake", "expert_seen", "expert_mean"):
            value = weights[0][f"model.layers.{index}.feed_forward.ghosts.{name}"]
            torch.testing.assert_close(value, getattr(layer.ghosts, name), rtol=0, atol=1e-6)


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks):
    found, _ = two_ranks
    for rank in found:
        assert rank["stopped"]["signal"] == signal.SIGTERM
        assert rank["stopped"]["reached"] == [4]


def test_buffers_of_a_rank_are_not_overwritten_by_those_of_another(two_ranks):
    found, _ = two_ranks
    assert [rank["stopped"]["buffer"] for rank in found] == [[0, 0], [1, 1]]


def test_a_loss_that_one_rank_cannot_use_is_refused_by_both(two_ranks):
    found, _ = two_ranks
    for rank in found:
        assert rank["refused"].startswith("step 1, first seen in the loss") and rank["refused"].endswith(
            "inf"
        )


def test_a_batch_that_does_not_divide_is_refused(two_ranks):
    found, _ = two_ranks
    for rank in found:
        assert rank["uneven"].startswith("--batch_size: batch does not divide among 2 processes")


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
