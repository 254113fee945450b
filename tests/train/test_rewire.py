"""Evolving edges while they train: when, with what state, in a resumed run, by what gradient."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.models import SparseMLP, SparseMLPConfig
from graphmoe.nn import SparseLinear
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, Stopped
from graphmoe.train.logs import RecordLog
from graphmoe.train.loop import Callback, Every, fit, reseed
from graphmoe.train.rewire import Rewire, move_moments


def model():
    reseed(0, 0)
    return SparseMLP(SparseMLPConfig(input_size=12, hidden_sizes=[20, 16], num_labels=3, density=0.3))


def batches(index, size, slots):
    random = np.random.default_rng([7, index])
    images = torch.from_numpy(random.normal(size=(size, 12)).astype(np.float32))
    return {"pixel_values": images[slots], "labels": (images[:, 0] > 0).long()[slots]}


class Watch(Callback):
    def __init__(self):
        self.losses, self.edges = {}, {}

    def on_step(self, state, model, outputs):
        self.losses[state.step] = (float.hex(state.metrics["loss"]), float.hex(state.metrics["grad_norm"]))
        self.edges[state.step] = [layer.edge_index() for layer in model.sparse_layers()]


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state, model, outputs):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(run_dir, *, growth="random", net=None, extra=(), resume_from=None, **options):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("recipe: test\n")
    net, watch = net or model(), Watch()
    rewire = Rewire(net, every=3, growth=growth, seed=5)
    records = RecordLog({"recipe": "test"}, extras=[rewire.figures])
    save = Every(4, on.Save(records=records))
    config = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 2, "device": "cpu"}
    config = RunConfig(num_threads=1, **(config | options))
    try:
        hooks = [rewire, records, watch, *extra, save]
        fit(net, batches, config, run_dir, callbacks=hooks, resume_from=resume_from)
    except Stopped:
        watch.stopped = True
    return net, watch


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("cut", [2, 5, 8, 10])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, growth, cut):
    whole, all_steps = train(tmp_path / "whole", growth=growth)
    _, first = train(tmp_path / "cut", growth=growth, extra=[Interrupt(cut)])
    assert first.stopped
    step_dir = checkpoint.latest(tmp_path / "cut")
    assert step_dir.name == f"step-{cut + 1:08d}"
    resumed, rest = train(tmp_path / "cut", growth=growth, net=model(), resume_from=step_dir)
    assert first.losses | rest.losses == all_steps.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    a, b = (checkpoint.read(tmp_path / name).records for name in ("whole", "cut"))
    assert np.array_equal(a["sparse_survival"], b["sparse_survival"])
    assert a["sparse_survival"].shape == (12, 2) and a["sparse_survival"][-1].max() < 1
    assert (a["sparse_edges"] == a["sparse_edges"][0]).all()


def test_edges_move_after_every_interval_but_not_after_the_last_step(tmp_path):
    net, watch = train(tmp_path / "run")
    moved = [
        step
        for step in range(2, 13)
        if any(not torch.equal(a, b) for a, b in zip(watch.edges[step], watch.edges[step - 1], strict=True))
    ]
    assert moved == [3, 6, 9] and int(net.layers[0].rewirings) == 3
    assert net.num_edges() == model().num_edges()


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, double):
    def halves(index, size, slots):
        step, micro = divmod(index, 2)
        return {name: part[micro * 4 : micro * 4 + 4] for name, part in batches(step, 8, slice(0, 8)).items()}

    def run(name, batches, **options):
        (tmp_path / name).mkdir()
        net = model().double()
        net.dropout.dropped = 0
        rewire = Rewire(net, every=1, growth="gradient")
        config = {"max_steps": 4, "learning_rate": 1e-2, "device": "cpu", "num_threads": 1, "warmup_steps": 0}
        fit(net, batches, RunConfig(**(config | options)), tmp_path / name, callbacks=[rewire])
        return net

    def as_double(make):
        def batch(*args):
            return {
                name: part.double() if part.is_floating_point() else part
                for name, part in make(*args).items()
            }

        return batch

    one = run("one", as_double(batches), batch_size=8)
    two = run("two", as_double(halves), batch_size=4, gradient_accumulation_steps=2)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("major", [True, False])
def test_the_gradient_of_all_places(major, tmp_path, double):
    layer, x = SparseLinear(5, 4, 0.4), torch.randn(3, 5)
    rewire = Rewire(layer, every=1, growth="gradient")
    state = FakeState(SGD(layer.parameters(), lr=0.1))
    rewire.on_start(state, layer)
    out = layer(x.t(), feature_major=True).t() if major else layer(x)
    out.square().sum().backward()
    dense = layer.dense_weight().requires_grad_()
    F.linear(x, dense, layer.bias).square().sum().backward()
    torch.testing.assert_close(rewire.gradients[0], dense.grad)
    rewire.on_end(state, layer)
    assert not layer._forward_hooks


class FakeState:
    accelerator = SimpleNamespace(num_processes=1)

    def __init__(self, optimizer, step=0, max_steps=10):
        self.optimizer, self.step, self.max_steps = optimizer, step, max_steps


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1), lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_moments_move_with_their_edges_and_new_ones_begin_at_zero(make):
    layer = SparseLinear(10, 8, 0.3)
    optimizer = make(layer.parameters())
    layer(torch.randn(6, 10)).square().sum().backward()
    optimizer.step()
    place = (layer.target.long() * 10 + layer.source).tolist()
    before = {
        key: dict(zip(place, value.tolist(), strict=True))
        for key, value in optimizer.state[layer.weight].items()
        if value is not None and value.dim()
    }
    steps = optimizer.state[layer.weight].get("step")
    origin = layer.rewire(0.3)
    move_moments(optimizer, layer.weight, origin)
    assert before and int((origin < 0).sum()) >= 5
    for key, old in before.items():
        for edge, (now, came) in enumerate(zip(
            optimizer.state[layer.weight][key].tolist(), origin.tolist(), strict=True
        )):  # fmt: skip
            where = int(layer.target[edge]) * 10 + int(layer.source[edge])
            assert now == (0 if came < 0 else old[where])
    assert optimizer.state[layer.weight].get("step") is steps


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_full_layer_has_nothing_to_grow(growth):
    net = SparseLinear(5, 4, 1.0)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    rewire, state = Rewire(net, every=1, growth=growth), FakeState(optimizer)
    rewire.on_start(state, net)
    net(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    weight, moments = net.weight.detach().clone(), optimizer.state[net.weight]["momentum_buffer"].clone()
    rewire.rewire(state)
    assert torch.equal(net.weight, weight) and net.survival() == 1
    assert torch.equal(optimizer.state[net.weight]["momentum_buffer"], moments) and moments.abs().min() > 0


def test_until_and_wrong_input():
    layer = SparseLinear(10, 8, 0.3)
    rewire = Rewire(layer, every=2, until=4)
    state = FakeState(None)
    assert [step for step in range(11) if rewire._due(state, step)] == [2, 4]
    assert Rewire(nn.Linear(2, 2), every=1).figures(state, layer) == {}
    for options, match in (
        ({"every": 0}, "no interval"),
        ({"every": 1, "fraction": 2}, "no share"),
        ({"every": 1, "growth": "hope"}, "unknown growth"),
    ):
        with pytest.raises(ConfigError, match=match):
            Rewire(layer, **options)


# Two processes ---------------------------------------------------------------------------------


def one_rank(out):
    """What each process of a run leaves of the model."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for growth in ("random", "gradient"):
        folder = out / f"{growth}-{os.environ.get('RANK', 'one')}"
        folder.mkdir()
        net = model().double()
        net.dropout.dropped = 0
        rewire = Rewire(net, every=2, growth=growth, seed=5)
        config = RunConfig(max_steps=7, batch_size=8, learning_rate=1e-2, warmup_steps=0, device="cpu")
        fit(net, doubles, config, folder, callbacks=[rewire])
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "net")


def doubles(index, size, slots):
    batch = batches(index, size, slots)
    return batch | {"pixel_values": batch["pixel_values"].double()}


@pytest.mark.slow
def test_two_processes_move_the_same_edges_as_one(tmp_path, double):
    one_rank(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = f"{root}:{root / 'tests'}"
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)], cwd=root,
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=480)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    for growth in ("random", "gradient"):
        one, *ranks = (load_file(tmp_path / f"{growth}-{rank}" / "net") for rank in ("one", "0", "1"))
        assert int(one["layers.0.rewirings"]) == 3
        for name, value in one.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
