"""Tickets in a vision transformer: what is pruned, pairs of networks image by image, stopping, bad flags."""

import json

import numpy as np
import pytest
import torch
from command_line import losses, run
from scipy.stats import binomtest
from transformers import ViTForImageClassification

from graphmoe import checkpoint, load
from graphmoe.train.lottery import Masks
from recipes import lottery_vit
from recipes.lottery_pairs import paired, wrong_answers
from recipes.lottery_vit import LotteryViTConfig
from recipes.set_config import read_images

SMALL = [
    *("--embed_dim=16", "--num_layers=2", "--num_heads=2", "--mlp_ratio=2", "--patch_dropout=0.5", "--flip"),
    *("--rounds=2", "--max_steps=12", "--rewind_step=3", "--warmup_steps=2", "--learning_rate=0.01"),
    *("--batch_size=32", "--save_every=4", "--log_every=4", "--num_threads=1", "--device=cpu"),
]
WEIGHTS = 2 * (4 * 16 * 16 + 2 * 16 * 32)
"""In queries, keys, values, outputs and both layers of the feed-forward of two blocks."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("lottery_vit", *SMALL, "--out_dir", out) == 0
    return out / "lottery_vit"


def read(path):
    return json.loads((path / "result.json").read_text())


def networks(finished):
    """Each network of the search but the dense one."""
    paths = sorted(finished.glob("level-*"))
    assert len(paths) == 6
    return [(path, read(path)) for path in paths]


def test_the_curve_has_exact_counts_beside_logistic_regression_and_chance(finished):
    result = read(finished)
    counts = [WEIGHTS, round(0.512 * WEIGHTS), round(0.512 * round(0.512 * WEIGHTS))]
    curve = result["metrics"]["curve"]
    assert [row["weights"] for row in curve] == counts and {row["total"] for row in curve} == {WEIGHTS}
    assert result["metrics"]["outside_masks"] == 0 and result["audits"] >= 1
    assert result["chance"]["test_accuracy"] == 0.1 and result["baseline"]["test_accuracy"] > 0.9


def test_only_the_blocks_are_pruned(finished):
    for path, result in networks(finished):
        model = load(path)
        assert type(model) is ViTForImageClassification
        assert all(name.startswith("vit.layers.") for name in result["layers"])
        zeros = {name: int((weight == 0).sum()) for name, weight in model.named_parameters()}
        kept = {name: weight.numel() - zeros[name] for name, weight in model.named_parameters()}
        assert {name: kept[name] for name in result["layers"]} == result["layers"]
        assert sum(result["layers"].values()) == result["weights"]
        # The bias of a neuron that nobody hears any more stays at 0.
        others = {name for name in zeros if not name.endswith("bias")} - set(result["layers"])
        assert not any(zeros[name] for name in others)


def test_a_ticket_begins_with_the_weights_of_an_early_step(finished, tmp_path):
    """One more step at rate 0 leaves the weights that a branch begins with."""
    flags = [*SMALL, "--max_steps=4", "--rounds=1", "--learning_rate=0", "--num_layers=1"]
    assert run("lottery_vit", *flags, "--out_dir", tmp_path) == 0
    dense = load(tmp_path / "lottery_vit").state_dict()
    for branch in ("ticket", "random", "reinit"):
        folder = checkpoint.latest(tmp_path / "lottery_vit" / f"level-01-{branch}")
        masks, found = Masks.load(folder / "masks.safetensors"), load(folder).state_dict()
        same = [torch.equal(found[name], dense[name] * masks.get(name, True)) for name in dense]
        assert all(same) == (branch != "reinit")


def test_pairs_are_those_of_the_answers(finished):
    dense, data = read(finished), read_images(LotteryViTConfig()).data
    images = data.test
    pairs = {(row["level"], row["branch"]): row for row in dense["pairs"]}
    assert len(pairs) == len(dense["pairs"]) == 6
    for _, result in networks(finished):
        assert len(images) - len(result["wrong"]) == round(result["metrics"]["accuracy"] * len(images))
        row = pairs[result["level"], result["branch"]]
        assert row["only_this"] - row["only_other"] == len(dense["wrong"]) - len(result["wrong"])
        assert row["share"] == result["weights"] / WEIGHTS
    path, result = networks(finished)[-1]
    assert wrong_answers(load(path), data, images) == result["wrong"]


def test_a_pair_is_judged_as_by_an_exact_binomial_test():
    random = np.random.default_rng(0)
    for size in (1, 5, 40, 300):
        one, other = (np.flatnonzero(random.random(size) < share).tolist() for share in (0.4, 0.6))
        found = paired(one, other)
        only_this, only_other = len(set(other) - set(one)), len(set(one) - set(other))
        assert (found["only_this"], found["only_other"]) == (only_this, only_other)
        if only_this + only_other:
            expected = binomtest(only_this, only_this + only_other).pvalue
            assert found["p_value"] == pytest.approx(expected)
    assert paired([1, 2], [2, 1]) == {"only_this": 0, "only_other": 0, "p_value": 1.0}


def test_stopped_anywhere_it_goes_on_as_if_never_stopped(finished, tmp_path, monkeypatch):
    """Once in the training of the dense network, once in that of the first ticket."""
    original, calls = lottery_vit.LotteryViTJob.batch, []

    def interrupted(job, index, size, slots):
        calls.append(index)
        if len(calls) in (7, 20):
            raise KeyboardInterrupt
        return original(job, index, size, slots)

    monkeypatch.setattr(lottery_vit.LotteryViTJob, "batch", interrupted)
    flags = [*SMALL, "--rounds=1", "--out_dir", tmp_path]
    assert run("lottery_vit", *flags) == 130
    assert run("lottery_vit", "--resume", *flags) == 130
    assert run("lottery_vit", "--resume", *flags) == 0
    assert calls[:21] == [*range(7), *range(4, 12), *range(3, 8), 4]
    for part in (".", "level-01-ticket", "level-01-reinit", "level-01-random"):
        assert losses(tmp_path / "lottery_vit" / part) == losses(finished / part)
        assert read(tmp_path / "lottery_vit" / part)["wrong"] == read(finished / part)["wrong"]


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--patch_size=3"], "--patch_size"),
        (["--embed_dim=16", "--num_heads=3"], "--embed_dim"),
        (["--patch_dropout=1"], "--patch_dropout"),
        (["--rewind_step=200"], "--rewind_step"),
        (["--dataset=cifar10"], "--data_dir"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(flags, where, tmp_path, capsys):
    assert run("lottery_vit", *flags, "--device=cpu", "--out_dir", tmp_path / "runs") == 2
    assert where in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
