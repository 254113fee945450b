"""Sparse classifiers of images: what a run leaves, stopping, scoring again, topologies side by side."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import losses, run

from graphmoe import checkpoint, load
from graphmoe.errors import ConfigError
from graphmoe.models import SparseMLP
from recipes.set_config import SetConfig, build_model, read_batches, read_images, with_steps
from recipes.set_mnist import score

SMALL = [
    *("--hidden_dim=40", "--num_layers=2", "--density=0.3", "--warmup_steps=5", "--eval_every=10"),
    *("--save_every=10", "--log_every=5", "--num_threads=1", "--device=cpu", "--max_steps=40"),
    *("--validation=0.05", "--rewire_until=0.5"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(out):
    assert run("set_mnist", *SMALL, "--out_dir", out) == 0
    return out / "set_mnist"


def read(path):
    return json.loads((path / "result.json").read_text())


def test_a_run_leaves_its_score_beside_logistic_regression_and_chance(finished):
    result = read(finished)
    metrics, baseline = result["metrics"], result["baseline"]
    assert result["chance"]["test_accuracy"] == 0.1 < metrics["test_accuracy"] <= 1
    assert baseline["name"] == "logistic regression" and baseline["test_accuracy"] > 0.9
    assert metrics["edges_before"] == metrics["edges_after"] == result["edges"]
    assert metrics["edges_before"] == pytest.approx(0.3 * (64 * 40 + 40 * 40 + 40 * 10), abs=1)
    assert result["dataset"] == "digits" and result["steps"] == 40
    assert all(0 < share < 1 for share in result["survival"])


def test_the_score_is_that_of_the_last_weights_on_the_test_part(finished):
    model, images = load(finished), read_images(SetConfig(validation=0.05))
    assert type(model) is SparseMLP
    found = score(model, images.data, images.data.test)
    metrics = read(finished)["metrics"]
    assert found["accuracy"] == metrics["test_accuracy"] and found["loss"] == pytest.approx(metrics["loss"])


def test_the_records_are_the_edges_of_the_model(finished):
    records, model = checkpoint.read(finished).records, load(finished)
    layer, source, target = records["final_feeds"]
    for index, sparse in enumerate(model.sparse_layers()):
        mine = layer == index
        assert np.array_equal(source[mine], sparse.source) and np.array_equal(target[mine], sparse.target)
        assert np.array_equal(records["final_feeds_weight"][mine], sparse.weight.detach())
        assert np.array_equal(records["final_feeds_age"][mine], sparse.age())
    assert records["final_feeds_size"].tolist() == [[64, 40], [40, 40]]
    assert records["sparse_survival"].shape == (8, 2)
    # 10 steps an epoch; after half of the 40 steps no edge moves.
    assert [int(layer.rewirings) for layer in model.sparse_layers()] == [2, 2]
    survival = records["sparse_survival"]
    assert 0.4 < survival[-1].min() <= survival[3].max() < 0.8 and (survival[3:] == survival[-1]).all()


def test_edges_of_an_epsilon_and_the_first_images():
    config = SetConfig(epsilon=13, hidden_dim=100, num_layers=2, train_images=500, test_images=50)
    images = read_images(config)
    everything = read_images(SetConfig(validation=config.validation)).data
    data = images.data
    assert len(data.train) + len(data.validation) == 500
    assert np.array_equal(data.test.images, everything.test.images[:50])
    model = build_model(config, images)
    assert [layer.weight.numel() for layer in model.layers] == [13 * 164, 13 * 200, 1000]
    static = build_model(replace(config, topology="dense"), images)
    assert static.num_edges() == 6400 + 10_000 + 1000


def test_scoring_again_says_the_same(finished, capsys):
    assert run("set_mnist", "--evaluate", finished) == 0
    said = capsys.readouterr().out
    assert f"set: test accuracy {read(finished)['metrics']['test_accuracy']:.4f}" in said
    assert "logistic regression: test accuracy" in said and "a uniform guess: test accuracy 0.1000" in said


def test_growth_by_gradients_and_a_run_that_goes_on(out):
    flags = [*SMALL, "--topology=rigl", "--out_dir", out, "--run_name", "rigl"]
    assert run("set_mnist", *flags, "--max_steps=20") == 0
    first = losses(out / "rigl")
    assert run("set_mnist", *flags, "--max_steps=25", "--resume") == 0
    assert losses(out / "rigl").items() >= first.items() and max(losses(out / "rigl")) == 25
    # Not after step 20, which was the last one of the first part.
    assert [int(layer.rewirings) for layer in load(out / "rigl").sparse_layers()] == [1, 1]


def test_topologies_side_by_side(out, capsys):
    flags = [
        *SMALL,
        "--max_steps=12",
        "--rewire_until=1",
        "--num_seeds=2",
        "--out_dir",
        out,
        "--dense_epochs=0.5",
    ]
    assert run("set_study", *flags) == 0
    result = read(out / "set_study")
    assert set(result["metrics"]) == {"set", "static", "dense", "test_accuracy"}
    assert result["metrics"]["test_accuracy"] == result["metrics"]["set"]
    table = (out / "set_study" / "comparison.md").read_text()
    assert "held-out accuracy" in table and "against static" in table
    assert all(
        f"| {name} " in table for name in ("set", "static", "dense", "logistic regression", "a uniform guess")
    )
    finished_runs = {path.parent.name for path in (out / "set_study").glob("*/result.json")}
    moved = {
        arm: load(out / "set_study" / f"{arm}-lr0.002-seed0").sparse_layers() for arm in ("set", "static")
    }
    assert [int(layer.rewirings) for layers in moved.values() for layer in layers] == [1, 1, 0, 0]
    dense = read(out / "set_study" / "dense-lr0.002-seed1")
    assert (result["steps"], dense["steps"]) == (12, 5)
    assert dense["edges"] == 64 * 40 + 40 * 40 + 40 * 10 == dense["metrics"]["edges_after"]
    # One that goes on has the same steps and intervals, and finds nothing to train.
    (out / "set_study" / "dense-lr0.002-seed1" / "result.json").unlink()
    capsys.readouterr()
    assert run("set_study", *flags, "--resume") == 0
    said = capsys.readouterr().out
    assert "resuming from step 5" in said and said.count("run 6 of 6") == 1 and "run 5 of 6" not in said
    assert finished_runs == {f"{arm}-lr0.002-seed{s}" for arm in ("set", "static", "dense") for s in (0, 1)}


def test_epochs_are_steps():
    config = SetConfig(epochs=2.5, batch_size=100, gradient_accumulation_steps=2, validation=0.05)
    images = read_images(config)
    batches = read_batches(config, images)
    assert batches.shift == 0 and batches.steps_per_epoch(100) == len(images.data.train) // 100 == 13
    config = with_steps(config, batches)
    assert config.max_steps == 17 and config.rewire_every == 6
    with torch.device("meta"):
        dense = build_model(SetConfig(topology="dense"), images)
    assert dense.num_edges() == 64_000 + 2_000_000 + 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=mnist"], "mnist is not part of this package, and the hub does not give it; expected a"),
        (["--density=0"], "--density"),
        (["--density=1.5"], "--density"),
        (["--epsilon=70"], "epsilon: no number of edges for this layer; expected above 0, at most"),
        (["--epsilon=-1"], "--epsilon"),
        (["--rewire_until=1.1"], "--rewire_until"),
        (["--train_images=2000"], "from 1 to 1438"),
        (["--test_images=0"], "--test_images"),
        (["--density=0.001"], "dense layers alone have more edges"),
        (["--zeta=1.5"], "--zeta"),
        (["--shift=8"], "no shift of these images"),
        (["--batch_size=2000"], "fewer images than a batch"),
        (["--validation=0.0001"], "no image to watch"),
        (["--distribution=fair"], "--distribution"),
    ],
)
def test_what_cannot_be_trained_ends_with_one_line(flags, message, tmp_path, capsys):
    assert run("set_mnist", *flags, "--out_dir", tmp_path, "--device=cpu") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"hidden_dim": 0}, {"rewire_every": 0}, {"dropout": 1}])
def test_flags_that_cannot_be_used(options):
    with pytest.raises(ConfigError, match=f"--{next(iter(options))}"):
        SetConfig(**options)
