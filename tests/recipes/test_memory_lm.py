"""The language model with a memory, beside the same one without."""

import json

import pytest
from command_line import SMALL, run

import graphmoe
from graphmoe import checkpoint
from recipes.memory_lm import WITHOUT


def test_both_models_of_a_run(corpus, tmp_path, capsys):
    flags = [*SMALL, "--num_memory_slots=4", "--num_memory_heads=2", "--dataset", corpus, "--max_steps=4"]
    assert run("memory_lm", *flags, "--out_dir", tmp_path) == 0
    folder = tmp_path / "memory_lm"
    result = json.loads((folder / "result.json").read_text())
    other = result["without_memory"]
    assert other["metrics"]["loss"] != result["metrics"]["loss"]
    memory = sum(p.numel() for n, p in graphmoe.load(folder).named_parameters() if "memory" in n)
    assert result["params_active"] - other["params_active"] == memory > 0
    assert result["flops_per_token"] > other["flops_per_token"]
    assert graphmoe.load(folder / "without_memory").model.layers[0].memory is None
    records = checkpoint.read(folder).records
    load = records["final_memory_load"]
    assert load.shape == (len(result["memory"]["gate"]), 4)
    assert load.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert result["memory"]["max_violation"] == pytest.approx(4 * load.max(axis=1) - 1, abs=1e-5)
    assert (records["final_memory_write"].sum(axis=1) <= 1 + 1e-5).all()
    assert records["final_memory_read"].sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert {"memory_map.png", "slot_load.png"} <= {path.name for path in (folder / "plots").iterdir()}
    assert "memory" not in json.loads((folder / WITHOUT / "result.json").read_text())
    assert result["sample"] and (folder / "report.html").exists()
    out = capsys.readouterr().out
    assert "with memory: " in out and "without: " in out
    assert run("memory_lm", "--evaluate", folder) == 0
    assert f"model: loss {result['metrics']['loss']:.4f}" in capsys.readouterr().out


def test_wrong_flags(corpus, tmp_path, capsys):
    for flags, message in (
        (["--num_memory_slots=-1"], "--num_memory_slots"),
        (["--num_memory_slots_per_tok=20"], "--num_memory_slots_per_tok: value cannot be used"),
        (["--num_memory_heads=3"], "--num_memory_heads: value cannot be used; expected a divisor of"),
    ):
        given = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2", *flags]
        assert run("memory_lm", *given) == 2
        assert message in capsys.readouterr().err
