"""The recipes of the differentiable neural computer, at sizes at which they only have to work."""

import json

import numpy as np
import pytest
from command_line import losses, run

import graphmoe
from graphmoe import checkpoint
from graphmoe.models import DNCForSequencePrediction, LSTMForSequencePrediction

TINY = ["--max_steps=4", "--baseline_steps=6", "--eval_sequences=12", "--hidden_size=12", "--slot_size=6"]
TINY = [*TINY, "--warmup_steps=1", "--log_every=1", "--eval_every=2", "--save_every=2", "--batch_size=4"]
TINY = [*TINY, "--num_threads=1", "--device=cpu", "--curriculum_steps=2"]
COPY = [*TINY, "--length=4", "--slots=6", "--more_lengths", "7", "--more_slots=8"]
TASKS = {
    "dnc_copy": [*COPY, "--heads=2"],
    "dnc_repeat_copy": [*TINY, "--length=3", "--repeats=2"],
    "dnc_recall": [*TINY, "--length=3", "--item_length=2"],
    "dnc_graph": [*TINY, "--length=3", "--walk=2", "--labels=2"],
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("dnc_copy", *TASKS["dnc_copy"], "--out_dir", out) == 0
    return out / "dnc_copy"


def test_what_a_run_leaves(copied):
    result = json.loads((copied / "result.json").read_text())
    metrics, baseline = result["metrics"], result["baseline"]
    asked = result["asked"]
    assert asked == 8 * 3 * (1 + 2 + 3 + 4)  # 3 sequences of each of 4 lengths
    for row in (metrics, baseline):
        total = row["bit_errors"] + row["second_set"]
        assert row["accuracy"] == pytest.approx(1 - total / (2 * asked))
    assert result["chance"] == {"accuracy": 0.5} and result["dataset"] == "copy" and result["steps"] == 4
    assert [(row["length"], row["slots"]) for row in result["beyond"]] == [(7, 8), (7, 6)]
    run_of_lstm = result["baseline_run"]
    assert run_of_lstm["steps"] == 6
    assert abs(run_of_lstm["params_total"] / result["params_total"] - 1) < 0.1
    assert isinstance(graphmoe.load(copied), DNCForSequencePrediction)
    assert isinstance(graphmoe.load(copied / "lstm"), LSTMForSequencePrediction)
    pictures = {path.stem for path in (copied / "plots").glob("*.png")}
    assert pictures >= {"training_curves", "dnc_memory", "dnc_links"}


def test_the_recorded_sequence_is_one_of_the_run(copied):
    records = checkpoint.read(copied).records
    assert records["final_dnc_read"].shape == (9, 2, 6) and records["final_dnc_usage"].shape == (9, 6)
    assert np.flatnonzero(records["final_dnc_asked"]).tolist() == [5, 6, 7, 8]
    wrong, asked = records["final_dnc_wrong"]
    assert 0 <= wrong <= asked == 4 * 8


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr("recipes.frame.visualize", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("_no_pictures")
def test_resumed_is_uninterrupted(tmp_path):
    flags = [*TASKS["dnc_copy"], "--out_dir", tmp_path, "--baseline_steps=0"]
    assert run("dnc_copy", *flags, "--max_steps=2", "--lr_scheduler_type=constant_with_warmup") == 0
    assert run("dnc_copy", *flags, "--resume", "--lr_scheduler_type=constant_with_warmup") == 0
    whole = [*flags, "--run_name=whole", "--lr_scheduler_type=constant_with_warmup"]
    assert run("dnc_copy", *whole) == 0
    assert losses(tmp_path / "dnc_copy") == losses(tmp_path / "whole")


def test_evaluate_with_other_slots_and_lengths(copied, capsys):
    flags = ["--evaluate", copied, "--device=cpu", "--eval_sequences=12"]
    assert run("dnc_copy", *flags) == 0
    same = capsys.readouterr().out
    count = json.loads((copied / "result.json").read_text())["metrics"]["bit_errors"]
    assert f"wrong {count} and " in same and "chance: 50.0 %" in same
    assert run("dnc_copy", *flags, "--slots=9", "--length=8") == 0
    assert "trained up to 4" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("recipe", ["dnc_repeat_copy", "dnc_recall", "dnc_graph"])
def test_other_tasks(recipe, tmp_path, capsys):
    assert run(recipe, *TASKS[recipe], "--out_dir", tmp_path, "--max_steps=2", "--baseline_steps=2") == 0
    result = json.loads((tmp_path / recipe / "result.json").read_text())
    assert ("errors" in result["metrics"]) == (recipe == "dnc_graph")
    assert result["chance"]["accuracy"] == (1 / 12 if recipe == "dnc_graph" else 0.5)
    said = capsys.readouterr().out
    assert "LSTM of equal size" in said and "chance: " in said


@pytest.mark.parametrize(
    "recipe, flags, message",
    [
        ("dnc_copy", ["--length=33"], "--length: 33 vectors have to be held at once, and there are 32 slots"),
        ("dnc_copy", ["--more_lengths", "70"], "--more_lengths: 70 vectors"),
        ("dnc_copy", ["--slots=0"], "--slots: "),
        ("dnc_copy", ["--bits=0"], "--bits: "),
        ("dnc_copy", ["--parallel=fsdp"], "--parallel: "),
        ("dnc_recall", ["--length=11"], "--length: 33 vectors"),
        ("dnc_repeat_copy", ["--repeats=0"], "--repeats: "),
        ("dnc_graph", ["--length=13"], "--names: "),
        ("dnc_graph", ["--curriculum_steps=-1"], "--curriculum_steps: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(recipe, flags, message, tmp_path, capsys):
    assert run(recipe, *flags, "--out_dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_evaluating_beyond_the_slots_is_refused(copied, capsys):
    assert run("dnc_copy", "--evaluate", copied, "--length=7") == 2
    assert "there are 6 slots" in capsys.readouterr().err


def test_evaluating_another_model_is_refused(tmp_path, capsys):
    assert run("dnc_copy", "--evaluate", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
