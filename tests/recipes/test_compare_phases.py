"""The comparison: equal active parameters, tuning on text that is not reported, stopping and going on."""

import json
import signal

import pytest
from command_line import SMALL, run

from graphmoe import checkpoint
from graphmoe.data import load_text
from graphmoe.models.cost import forward_flops
from graphmoe.train.command import Stopped
from recipes import compare_phases, comparison, language_model
from recipes.compare_phases import CompareConfig, phase_config
from recipes.phases import MODES

PHASES = ["moe", "hgnn"]
FLAGS = [*SMALL, "--max_steps=3", "--num_seeds=2", "--learning_rates", "1e-3", "3e-3", "--phases", *PHASES]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("compare_phases", *FLAGS, "--dataset", corpus, "--out_dir", out) == 0
    return out / "compare_phases"


def test_what_it_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "tuning.json",
        "result.json",
        "comparison.md",
        "comparison.csv",
        "comparison.png",
    } <= names
    tuning = json.loads((finished / "tuning.json").read_text())
    runs = {path.parent.name for path in finished.glob("*/result.json")}
    first = {f"{phase}-lr{rate}-seed0" for phase in PHASES for rate in ("0.001", "0.003")}
    second = {f"{phase}-lr{tuning['best'][phase]:g}-seed1" for phase in PHASES}
    assert runs == first | second
    for phase in PHASES:
        losses = tuning["losses"][phase]
        assert losses[f"{tuning['best'][phase]:g}"] == min(losses.values())
        for rate, loss in losses.items():
            result = json.loads((finished / f"{phase}-lr{rate}-seed0" / "result.json").read_text())
            assert result["validation"]["loss"] == loss != result["metrics"]["loss"]
    table = (finished / "comparison.md").read_text()
    assert all(f"\n| {phase} " in table for phase in PHASES) and "unigram" in table and "chance" in table
    result = json.loads((finished / "result.json").read_text())
    assert set(result["metrics"]) == set(PHASES) and result["baseline"]["name"] == "unigram"


@pytest.mark.parametrize("equal", ["parameters", "flops"])
def test_phases_have_equal_cost(corpus, equal):
    text = load_text(corpus, tokenizer="bytes")
    config = CompareConfig(tokenizer="bytes", embed_dim=32, num_layers=2, num_heads=2, expert_dim=64)
    arms = {phase: phase_config(config, phase) for phase in MODES}
    matched = comparison.match_cost(arms, "moe", text, equal=equal)
    models = {name: language_model.build_model(c, text) for name, c in matched.items()}
    cost = {
        name: model.num_active_parameters() if equal == "parameters" else forward_flops(model, config.seq_len)
        for name, model in models.items()
    }
    assert matched["moe"].expert_dim == 64
    assert all(abs(value / cost["moe"] - 1) < 0.01 for value in cost.values()), cost
    assert matched["gnn"].expert_dim < matched["hgnn"].expert_dim < 64 < matched["dense"].expert_dim


def test_stopped_and_resumed_gives_the_same_table(finished, corpus, tmp_path, monkeypatch):
    train, calls = language_model.train, []

    def stop_in_the_third(config, *args, **options):
        calls.append(config.run_name)
        if len(calls) == 3:
            raise Stopped(signal.SIGTERM)
        return train(config, *args, **options)

    monkeypatch.setattr(language_model, "train", stop_in_the_third)
    assert run("compare_phases", *FLAGS, "--dataset", corpus, "--out_dir", tmp_path) == 143
    assert run("compare_phases", "--resume", "--out_dir", tmp_path) == 0
    assert len(calls) == len(set(calls)) + 1 == 7  # the stopped run twice, the others once
    results = [
        json.loads((path / "result.json").read_text()) for path in (finished, tmp_path / "compare_phases")
    ]
    assert results[0]["metrics"] == results[1]["metrics"]
    calls.clear()
    assert run("compare_phases", "--resume", "--out_dir", tmp_path) == 0
    assert calls == []
    assert run("compare_phases", "--evaluate", tmp_path / "compare_phases") == 0


def test_a_finished_run_is_not_mistaken_for_another(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*")}
    assert run("compare_phases", "--resume", "--out_dir", finished.parent, "--max_steps=4") == 2
    assert "other settings: max_steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*")} == before


def test_equal_seeds_see_equal_data(finished):
    """A paired difference needs the same batches on both sides: the first losses differ by the model only."""
    chance = json.loads((finished / "result.json").read_text())["chance"]["loss"]
    for phase in PHASES:
        rows = checkpoint.read(finished / f"{phase}-lr0.001-seed0").metrics
        first = next(row for row in rows if row["kind"] == "train")
        assert abs(first["lm_loss"] - chance) < 0.3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--phases", "gnn"], "--phases: value cannot be used; expected moe and others"),
        (["--phases", "moe", "mesh"], "--phases"),
        (["--num_seeds=0"], "--num_seeds"),
        (["--learning_rates", "0"], "--learning_rates"),
        (["--learning_rates", "1e-3", "1e-3"], "--learning_rates"),
        (["--coupling=gnn"], "--coupling"),
        (["--embed_dim=64", "--expert_dim=1", "--phases", "moe", "gnn"], "--expert_dim"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, corpus, tmp_path, capsys):
    assert run("compare_phases", *FLAGS, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "runs").exists()


def test_reference_is_a_phase():
    assert compare_phases.REFERENCE in MODES
