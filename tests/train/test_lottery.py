"""Training under a mask: what stays 0, where a ticket begins, and that a stopped run goes on."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from graphmoe import checkpoint
from graphmoe.errors import CheckpointError, ConfigError, GraphMoEError
from graphmoe.models import SparseMLP, SparseMLPConfig
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, Stopped
from graphmoe.train.loop import Callback, Every, fit, reseed
from graphmoe.train.lottery import EnforceMasks, KeepState, Masks, Rewind

STEPS = 10


def model(seed=0):
    reseed(seed, 0)
    sizes = {"input_size": 12, "hidden_sizes": [20, 16], "num_labels": 3}
    return SparseMLP(SparseMLPConfig(**sizes, density=1.0, dropout=0.1))


def batches(index, size, slots):
    random = np.random.default_rng([7, index])
    images = torch.from_numpy(random.normal(size=(size, 12)).astype(np.float32))
    return {"pixel_values": images[slots], "labels": (images[:, 0] > 0).long()[slots]}


class Watch(Callback):
    """Losses, norms and rates by step, and whether anything outside a mask was not 0 behind any step."""

    def __init__(self, masks):
        self.masks, self.lines, self.first, self.outside = masks, {}, None, 0

    def on_start(self, state, model):
        self.first = {name: value.clone() for name, value in model.state_dict().items()}

    def on_step(self, state, model, outputs):
        keys = ("loss", "grad_norm", "lr")
        self.lines[state.step] = tuple(float.hex(state.metrics[key]) for key in keys)
        self.outside += sum(self.masks.outside(model, state.optimizer).values())


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state, model, outputs):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(run_dir, hooks, masks, *, net=None, resume_from=None, **options):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("recipe: test\n")
    net, watch = net or model(), Watch(masks)
    config = {"max_steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3, "device": "cpu"}
    config = RunConfig(num_threads=1, weight_decay=0.5, **(config | options))
    try:
        fit(net, batches, config, run_dir, callbacks=[*hooks, watch, Every(4, on.Save())],
            resume_from=resume_from)  # fmt: skip
    except Stopped:
        watch.stopped = True
    return net, watch


def search(folder, step):
    """A dense network whose weights of ``step`` are kept, and the masks that it is pruned to."""
    masks, start = Masks.full(model()), folder / "start.safetensors"
    net, watch = train(folder / "dense", [KeepState(start, step), EnforceMasks(masks)], masks)
    return net, watch, start, masks.prune(net, 0.6, scope="global")


@pytest.mark.parametrize("step", [0, 3])
def test_a_ticket_begins_with_all_weights_of_the_step(tmp_path, step):
    _, dense, start, masks = search(tmp_path, step)
    kept = KeepState(tmp_path / "again.safetensors", step)
    train(tmp_path / "same", [kept, EnforceMasks(Masks.full(model()))], masks)
    begin, _ = checkpoint.read_tensors(tmp_path / "again.safetensors")
    if step == 0:
        assert all(torch.equal(value, begin[name]) for name, value in model().state_dict().items())
    enforce = EnforceMasks(masks, audit_every=3)
    net, watch = train(tmp_path / "ticket", [Rewind(start, step), enforce], masks, net=model(seed=5))
    for name, value in begin.items():
        expected = value * masks[name] if name in masks else value  # biases are rewound, too
        assert torch.equal(watch.first[name], expected), name
    steps = list(watch.lines)
    assert steps == list(range(step + 1, STEPS + 1)) and watch.outside == 0
    assert [watch.lines[at][2] for at in steps] == [dense.lines[at][2] for at in steps]  # learning rates
    assert enforce.audits == len([at for at in steps if at % 3 == 0 or at == STEPS])
    assert sum(int((net.get_parameter(name) != 0).sum()) for name in masks) == masks.remaining


def test_without_pruning_a_ticket_repeats_the_dense_network(tmp_path):
    net, dense, start, _ = search(tmp_path, 0)
    full = Masks.full(net)
    again, watch = train(tmp_path / "ticket", [Rewind(start), EnforceMasks(full)], full, net=model(seed=5))
    assert watch.lines == dense.lines
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


def test_the_norm_of_gradients_is_that_of_the_sparse_network(tmp_path):
    """An equal network in which nothing is pruned, because it has zeros for inputs, is the oracle."""
    net = model()
    masks = Masks({"layers.0.weight": torch.arange(12).expand(20, 12) < 6})
    _, watch = train(tmp_path / "run", [EnforceMasks(masks)], masks, net=net, max_steps=1)
    other, batch = model(), batches(0, 8, slice(0, 8))
    reseed(0, 0)
    other.train()
    other(batch["pixel_values"] * (torch.arange(12) < 6), labels=batch["labels"]).loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in other.parameters()]).sum().sqrt()
    assert float.fromhex(watch.lines[1][1]) == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("step, cut", [(0, 1), (0, 6), (3, 4)])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, step, cut):
    _, _, start, masks = search(tmp_path, step)
    hooks = [Rewind(start, step), EnforceMasks(masks)]
    whole, all_steps = train(tmp_path / "whole", hooks, masks, net=model(seed=5))
    _, first = train(tmp_path / "cut", [*hooks, Interrupt(cut)], masks, net=model(seed=5))
    assert first.stopped
    step_dir = checkpoint.latest(tmp_path / "cut")
    resumed, rest = train(tmp_path / "cut", hooks, masks, net=model(seed=6), resume_from=step_dir)
    # The signal is heard at the end of the next step.
    assert min(rest.lines) == cut + 2 and first.lines | rest.lines == all_steps.lines
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


class Revive(Callback):
    def on_step(self, state, model, outputs):
        if state.step == 2:
            with torch.no_grad():
                model.layers[0].weight.fill_(1.0)


def test_an_audit_ends_a_run_whose_mask_is_not_applied(tmp_path):
    class Lenient(EnforceMasks):
        def on_start(self, state, model):
            self._kept = {}

    masks = Masks.full(model()).prune(model(), 0.5)
    with pytest.raises(GraphMoEError, match=r"layers\.0\.weight: pruned weights are not 0"):
        train(tmp_path / "run", [Lenient(masks, audit_every=2)], masks)
    # What another callback revives is gone after the next step.
    net, watch = train(tmp_path / "revived", [EnforceMasks(masks), Revive()], masks)
    assert watch.outside > 0 and sum(masks.outside(net).values()) == 0


def test_hooks_are_gone_after_a_run(tmp_path):
    masks = Masks.full(model()).prune(model(), 0.5)
    net, _ = train(tmp_path / "run", [EnforceMasks(masks)], masks, max_steps=2)
    net(**batches(0, 8, slice(0, 8))).loss.backward()
    weight, pruned = net.layers[0].weight, ~masks["layers.0.weight"]
    assert weight.grad[pruned].count_nonzero() > 0


def test_what_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="no interval"):
        EnforceMasks(Masks.full(model()), audit_every=0)
    other = Masks.full(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="no such parameter"):
        train(tmp_path / "a", [EnforceMasks(other)], Masks.full(model()))
    with pytest.raises(CheckpointError, match="no such file"):
        train(tmp_path / "b", [Rewind(tmp_path / "nothing")], Masks.full(model()))
    KeepState(tmp_path / "kept", 0).on_start(FakeState(), model())
    with pytest.raises(ConfigError, match="weights of another step"):
        train(tmp_path / "c", [Rewind(tmp_path / "kept", 2)], Masks.full(model()))


class FakeState:
    step = 0
    accelerator = SimpleNamespace(is_main_process=True)
