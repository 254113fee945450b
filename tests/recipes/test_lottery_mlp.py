"""A search for lottery tickets: its curve, its audit, stopping, scoring again, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

from graphmoe import checkpoint, load
from graphmoe.checkpoint.manifest import write_manifest
from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.models import SparseMLP
from graphmoe.train.lottery import Masks
from recipes import lottery
from recipes.lottery_mlp import LotteryMLPConfig, LotteryMLPJob
from recipes.lottery_table import curve, standard_error

SMALL = [
    *("--hidden_sizes", "12", "8", "--max_steps=6", "--rounds=2", "--eval_every=6", "--save_every=3"),
    *("--log_every=3", "--num_threads=1", "--device=cpu", "--validation=0.05"),
]
SIZES = {"layers.0.weight": 64 * 12, "layers.1.weight": 12 * 8, "layers.2.weight": 8 * 10}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("lottery_mlp", *SMALL, "--num_seeds=2", "--rewind_step=2", "--out_dir", out) == 0
    return out / "lottery_mlp"


def read(path):
    return json.loads((path / "result.json").read_text())


def alone(path):
    """Accuracy of a network, without those that were found in it."""
    result = read(path)
    return result["networks"][0]["accuracy"] if "networks" in result else result["metrics"]["accuracy"]


def networks(run_dir):
    """Folder of every network, by seed, level and branch."""
    folders = {0: run_dir, 1: run_dir / "seed-1"}
    found = {(seed, 0, "dense"): folder for seed, folder in folders.items()}
    for seed, folder in folders.items():
        for path in folder.glob("level-*"):
            level, branch = path.name.split("-")[1:]
            found[seed, int(level), branch] = path
    return found


def test_a_search_leaves_its_curve_beside_logistic_regression_and_chance(finished):
    result = read(finished)
    rows, found = result["metrics"]["curve"], networks(finished)
    assert len(found) == 2 * (1 + 2 * 3) and [row["level"] for row in rows] == [0, 1, 2]
    kept = dict(SIZES)
    for row in rows:
        if row["level"]:  # three cuts of 20 % at once, of the output layer of 10 %
            cuts = {name: 0.729 if name == "layers.2.weight" else 0.512 for name in SIZES}
            kept = {name: round(cuts[name] * count) for name, count in kept.items()}
        assert row["layers"] == kept and row["weights"] == sum(kept.values())
        assert row["total"] == sum(SIZES.values()) and row["share"] == row["weights"] / row["total"]
        assert row["outside_mask"] == 0
        for branch, by_seed in row["by_seed"].items():
            values = [alone(found[seed, row["level"], branch]) for seed in (0, 1)]
            assert list(by_seed.values()) == values and row["accuracy"][branch] == np.mean(values)
            assert row["standard_error"][branch] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert set(rows[0]["accuracy"]) == {"dense"} and set(rows[2]["accuracy"]) == {
        "ticket",
        "reinit",
        "random",
    }
    assert result["baseline"]["name"] == "logistic regression" and result["baseline"]["test_accuracy"] > 0.9
    assert result["chance"]["test_accuracy"] == 0.1
    for name in ("lottery_curve", "ticket_layers", "ticket_pixels"):
        assert (finished / "plots" / f"{name}.png").stat().st_size > 1000


def test_masks_are_nested_and_controls_have_their_counts(finished):
    found, masks = networks(finished), {}
    for place, path in found.items():
        masks[place] = Masks.load(checkpoint.latest(path) / "masks.safetensors")
        weights = load(path).state_dict()
        assert all((weights[name][~mask] == 0).all() for name, mask in masks[place].items()), place
    for seed in (0, 1):
        for level in (1, 2):
            ticket = masks[seed, level, "ticket"]
            above = masks[seed, level - 1, "dense" if level == 1 else "ticket"]
            assert ticket.within(above) and ticket.remaining < above.remaining
            trained = load(found[seed, level - 1, "dense" if level == 1 else "ticket"])
            assert above.prune(trained, 0.488, fractions={"layers.2.weight": 0.271}).within(ticket)
            same, random = masks[seed, level, "reinit"], masks[seed, level, "random"]
            assert same.within(ticket) and ticket.within(same)
            assert random.counts == ticket.counts and not random.within(ticket)


def test_branches_begin_where_they_should(finished, monkeypatch, tmp_path):
    """Nothing is learned at a rate of 0, so that the last weights are the first ones."""
    flags = [*SMALL, "--rounds=1", "--learning_rate=0", "--out_dir", tmp_path]
    assert run("lottery_mlp", *flags) == 0
    states = {branch: load(path).state_dict() for (seed, _, branch), path in
              networks(tmp_path / "lottery_mlp").items() if path.exists()}  # fmt: skip
    dense = states.pop("dense")
    start = load_file(tmp_path / "lottery_mlp" / "start.safetensors")
    assert all(torch.equal(start[name], value) for name, value in dense.items())
    for branch, state in states.items():
        for name, value in state.items():
            there = value != 0
            assert torch.equal(value[there], dense[name][there]) == (branch != "reinit" or "bias" in name)
    other = load_file(finished / "start.safetensors")  # of step 2
    assert not torch.equal(other["layers.0.weight"], start["layers.0.weight"])
    result = read(finished / "level-01-ticket")
    assert result["steps"] == 6 and result["audits"] == 1  # of steps 3 to 6, the last one
    steps = [row["step"] for row in checkpoint.read(finished / "level-01-ticket").metrics]
    assert min(steps) == 3


def test_stopped_anywhere_it_goes_on_as_if_never_stopped(finished, tmp_path, monkeypatch):
    original, calls = lottery.LotteryJob.batch, []

    def interrupted(job, index, size, slots):
        calls.append((job.config.seed, job.place.level, job.place.branch, index))
        if len(calls) in (4, 16, 47):
            raise KeyboardInterrupt
        return original(job, index, size, slots)

    monkeypatch.setattr(lottery.LotteryJob, "batch", interrupted)
    flags = [*SMALL, "--num_seeds=2", "--rewind_step=2", "--out_dir", tmp_path]
    assert run("lottery_mlp", *flags) == 130
    assert run("lottery_mlp", "--resume", *flags) == 130
    assert run("lottery_mlp", "--resume", *flags) == 130
    assert run("lottery_mlp", "--resume", *flags) == 0
    begin = {"dense": 0, "reinit": 0, "ticket": 2, "random": 2}
    every = {(seed, level, branch, index) for seed, level, branch in networks(finished)
             for index in range(begin[branch], 6)}  # fmt: skip
    # What was interrupted and what came after the last checkpoint is done again, at most 3 steps.
    assert set(calls) == every and 3 <= len(calls) - len(every) <= 9
    assert read(tmp_path / "lottery_mlp")["metrics"]["curve"] == read(finished)["metrics"]["curve"]
    for place, path in networks(tmp_path / "lottery_mlp").items():
        whole = load(networks(finished)[place]).state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in load(path).state_dict().items())


def test_more_levels_keep_those_that_are_finished(tmp_path, monkeypatch):
    flags = [*SMALL, "--branches", "ticket", "--out_dir", tmp_path]
    assert run("lottery_mlp", *flags, "--rounds=1") == 0
    original, seen = lottery.LotteryJob.batch, set()

    def watched(job, index, size, slots):
        seen.add((job.place.level, job.place.branch))
        return original(job, index, size, slots)

    monkeypatch.setattr(lottery.LotteryJob, "batch", watched)
    assert run("lottery_mlp", "--resume", "--rounds=2", "--out_dir", tmp_path) == 0
    assert seen == {(2, "ticket")} and len(read(tmp_path / "lottery_mlp")["metrics"]["curve"]) == 3


def test_finished_networks_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    flags = [*SMALL, "--rounds=1", "--branches", "ticket", "--out_dir", tmp_path]
    assert run("lottery_mlp", *flags) == 0
    assert run("lottery_mlp", "--resume", "--scope=global", "--out_dir", tmp_path) == 2
    assert "there is a network with other settings: scope" in capsys.readouterr().err


def test_scoring_again_says_the_same_and_audits(finished, tmp_path, capsys):
    assert run("lottery_mlp", "--evaluate", finished) == 0
    said = capsys.readouterr().out
    for row in read(finished)["metrics"]["curve"]:
        for branch, value in row["accuracy"].items():
            error = row["standard_error"][branch]
            assert f"{100 * value:.2f} ± {100 * error:.2f}" in said
    assert "logistic regression: " in said and "a uniform guess: 10.00" in said
    copy = tmp_path / "copy"
    shutil.copytree(finished / "level-02-ticket", copy)
    file = checkpoint.latest(copy) / "model.safetensors"
    tensors = load_file(file)
    tensors["layers.0.weight"][:] = 1
    save_file(tensors, file, {"format": "pt"})
    (file.parent / "manifest.json").unlink()
    write_manifest(file.parent, 6)  # damage that no checksum shows
    job = LotteryMLPJob(LotteryMLPConfig(hidden_sizes=[12, 8], validation=0.05), "lottery_mlp")
    with pytest.raises(GraphMoEError, match=r"layers\.0\.weight: pruned weights are not 0"):
        job.score_again(copy)


def test_pixels_and_parameters(finished):
    records = checkpoint.read(finished).records
    heard = records["final_ticket_pixels"]
    assert heard.shape == (3, 64) and (heard[0] == 12).all()
    mask = Masks.load(checkpoint.latest(finished / "level-02-ticket") / "masks.safetensors")
    assert np.array_equal(heard[2], mask["layers.0.weight"].sum(dim=0))
    result = read(finished / "level-02-random")
    assert type(load(finished)) is SparseMLP
    assert result["params_total"] - result["params_active"] == mask.total - mask.remaining


def test_rows_of_one_seed_have_no_error():
    network = {"seed": 3, "level": 0, "branch": "dense", "weights": 9, "total": 9, "layers": {"a": 9}}
    network |= {"outside_mask": 0, "validation": {"accuracy": 0.5}, "accuracy": 0.25}
    (row,) = curve([network])
    assert row["standard_error"] == {"dense": None} and row["by_seed"] == {"dense": {"3": 0.25}}
    assert row["validation"] == {"dense": 0.5} and row["share"] == 1
    assert standard_error(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / 3**0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=mnist"], "mnist is not part of this package"),
        (["--cut=1"], "--cut"),
        (["--output_cut=1"], "--output_cut"),
        (["--scope=universe"], "--scope"),
        (["--rewind_step=6"], "--rewind_step"),
        (["--branches", "reinit"], "--branches"),
        (["--batch_size=2000"], "fewer images than a batch"),
        (["--validation=0.0001"], "no image to watch"),
        (["--parallel=fsdp"], "sharded weights cannot be pruned"),
    ],
)
def test_what_cannot_be_searched_ends_with_one_line(flags, message, tmp_path, capsys):
    assert run("lottery_mlp", *SMALL, *flags, "--out_dir", tmp_path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_flags():
    assert LotteryMLPConfig().share_cut() == pytest.approx(0.488)
    assert LotteryMLPConfig(cuts=1).share_cut(0.1) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="--hidden_sizes"):
        LotteryMLPConfig(hidden_sizes=[])
