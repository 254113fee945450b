"""Bias and thresholds through whole runs: what moves them, stopping and resuming, evaluation."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_model

from graphmoe import checkpoint, metrics
from graphmoe.errors import DataError
from graphmoe.nn import moe_layers
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig
from graphmoe.train.loop import Callback, Every, NonFiniteError, fit, reseed
from graphmoe.train.routing import RouterBalance, probe_balance

KINDS = {
    "bias": {"router_bias": True, "router_bias_rate": 0.1, "router_aux_loss_coef": 0.0},
    "threshold": {"router": "threshold", "router_aux_loss_coef": 0.0},
}


def model(kind, **options):
    reseed(0, 0)
    return tiny_model(**{"num_experts_per_tok": 2, **KINDS[kind], **options})


def batches(index, size, slots):
    ids = torch.from_numpy(np.random.default_rng([7, index]).integers(0, 31, (size, 24))[slots])
    return {"input_ids": ids, "labels": ids, "output_records": True}


def config(steps=12):
    settings = {"batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3, "device": "cpu", "num_threads": 1}
    return RunConfig(max_steps=steps, **settings)


class Watch(Callback):
    def __init__(self):
        self.losses, self.served, self.buffers = [], [], []

    def on_step(self, state, net, outputs):
        self.losses.append(state.metrics["loss"])
        self.served.append([record.routing.ptr.diff() for record in outputs.records])
        self.buffers.append({name: value.clone() for name, value in net.named_buffers()})


def train(run_dir, kind, *, steps=12, net=None, extra=(), **options):
    net = model(kind) if net is None else net
    watch = Watch()
    fit(net, batches, config(steps), run_dir, callbacks=[RouterBalance(net), watch, *extra], **options)
    return net, watch


def test_bias_follows_the_loads_of_the_steps(tmp_path):
    _, watch = train(tmp_path, "bias")
    moved = False
    for layer in range(2):
        want = torch.zeros(4, dtype=torch.long)
        for served, buffers in zip(watch.served, watch.buffers, strict=True):
            count = served[layer]
            want += torch.sign(count.double().mean() - count).long()
            assert torch.equal(buffers[f"model.layers.{layer}.feed_forward.router.bias_steps"], want)
            moved |= bool(want.any())
    assert moved


@pytest.mark.parametrize("kind", KINDS)
def test_loads_come_near_their_target(tmp_path, kind):
    """Scores that favour two experts and do not change: weights are frozen by a learning rate of 0."""
    net = model(kind)
    with torch.no_grad():
        for layer in moe_layers(net):
            layer.router.weight.copy_(torch.randn(4, 16))
        net.model.embed_tokens.weight += 0.02 * moe_layers(net)[0].router.weight[:2].sum(dim=0)
    frozen = dataclasses.replace(config(160), learning_rate=0.0)
    watch = Watch()
    fit(net, batches, frozen, tmp_path, callbacks=[RouterBalance(net), watch])
    served = torch.stack([torch.stack(step) for step in watch.served]).double()  # [S, L, E]
    target = 8 * 24 * 2 / 4
    assert (served[0] / target - 1).abs().max() > 0.3
    late = served[-30:].mean(dim=0)
    assert ((late / target - 1).abs() < 0.2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        run.mkdir()
    _, watch = train(whole, kind, extra=[Every(12, on.Save())])

    class Stop(Exception):
        pass

    class Interrupt(Callback):
        def on_step(self, state, net, outputs):
            if state.step == 5:
                raise Stop

    with pytest.raises(Stop):
        train(cut, kind, extra=[Every(5, on.Save()), Interrupt()])
    _, rest = train(cut, kind, resume_from=checkpoint.latest(cut), extra=[Every(12, on.Save())])
    assert [x.hex() for x in rest.losses] == [x.hex() for x in watch.losses[5:]]
    paths = [checkpoint.latest(run) / "model.safetensors" for run in (whole, cut)]
    first, second = (load_file(path) for path in paths)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("router.bias_steps" in name or "router.threshold" in name for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_generation_move_nothing(tmp_path, kind):
    net, _ = train(tmp_path, kind)
    before = {name: value.clone() for name, value in net.named_buffers()}
    net.eval()
    net.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    net(**batches(0, 4, slice(0, 4)))
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_padding_is_not_observed(tmp_path):
    """What stands where the mask is 0 must not enter the thresholds, nor the bias."""

    def padded(filler):
        def make(index, size, slots):
            batch = batches(index, size, slots)
            mask = (torch.arange(24) < 14).long().expand_as(batch["input_ids"])
            ids = torch.where(mask > 0, batch["input_ids"], filler)
            labels = torch.where(mask > 0, ids, -100)
            return {**batch, "input_ids": ids, "labels": labels, "attention_mask": mask}

        return make

    for kind in KINDS:
        found = []
        for filler in (5, 6):
            net, watch = model(kind), Watch()
            fit(net, padded(filler), config(4), tmp_path, callbacks=[RouterBalance(net), watch])
            found.append(watch)
        assert found[0].losses == found[1].losses
        for name, value in found[0].buffers[-1].items():
            assert torch.equal(value, found[1].buffers[-1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_no_numbers_stop_the_run_and_name_the_layer(tmp_path, kind):
    net = model(kind)
    with torch.no_grad():
        moe_layers(net)[1].router.weight[2, 3] = float("nan")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1, first seen in records\[1\].logits"):
        train(tmp_path, kind, net=net)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_violation_of_batches_by_hand(double):
    net = model("bias").eval()
    windows = np.random.default_rng(0).integers(0, 31, (6, 13))
    found = probe_balance(net, windows, batch_size=3, samples=40, seed=5)
    loads = torch.stack(
        [
            torch.stack(
                [
                    r.routing.ptr.diff()
                    for r in net(
                        torch.from_numpy(row[None, :-1]), output_records=True, use_cache=False
                    ).records
                ]
            )
            for row in windows
        ]
    ).double()  # [n, L, E]
    drawn = torch.randint(6, (40, 3), generator=torch.Generator().manual_seed(5))
    for layer in range(2):
        plain, even = 0.0, 0.0
        for rows in drawn:
            load = sum(loads[row, layer] for row in rows)
            plain += float(load.max() / load.mean() - 1) / 40
            load = load / loads[:, layer].sum(dim=0)
            even += float(load.max() / load.mean() - 1) / 40
        assert found["final_batch_violation"][layer] == pytest.approx(plain)
        assert found["final_batch_violation_even"][layer] == pytest.approx(even)


def test_an_even_load_of_independent_tokens_is_the_blind_floor():
    net = model("bias", router_bias=False)
    windows = np.random.default_rng(0).integers(0, 31, (2000, 2))  # one token a window
    found = probe_balance(net, windows, batch_size=64)
    assert (found["final_batch_violation"] > 1.2 * found["final_batch_violation_even"]).all()
    # Tokens of one id always go the same way: 31 kinds of tokens are a little less even than none.
    floor = metrics.random_max_violation(64, 4, 2)
    assert ((found["final_batch_violation_even"] / floor - 1).abs() < 0.35).all()


def test_nothing_to_probe():
    dense = tiny_model(num_experts=1, num_experts_per_tok=1)
    assert probe_balance(dense, np.zeros((2, 5), int), batch_size=2) == {}
    with pytest.raises(DataError, match="windows: nothing to measure on"):
        probe_balance(model("bias"), np.zeros((0, 5), int), batch_size=2)
