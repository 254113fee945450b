"""The classifier of slots, experts and n-grams from the outside."""

import argparse
import bisect
import inspect
import json

import pytest
from command_line import losses, run

from graphmoe import checkpoint, load
from graphmoe.models import MocaForSequenceClassification

SMALL = [
    *("--embed_dim=16", "--num_heads=2", "--expert_dim=8", "--num_slots=4", "--seq_len=24"),
    *("--vocab_size=256", "--num_ngrams=4096", "--batch_size=8", "--warmup_steps=2", "--log_every=2"),
    *("--save_every=4", "--num_threads=1", "--device=cpu", "--validation=0.15", "--test=0.2"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Lines of two modules of the standard library."""
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    lines = []
    for module in (argparse, bisect):
        source = inspect.getsource(module).splitlines()
        kept = list(dict.fromkeys(" ".join(line.split()) for line in source if len(line.split()) > 3))
        lines += [f"{line}\t{module.__name__}\n" for line in kept[:40]]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("moca_text", *SMALL, "--max_steps=8", "--dataset", texts, "--out_dir", out) == 0
    return out / "moca_text"


def test_what_a_run_leaves(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["chance"]["accuracy"] == 0.5 and result["steps"] == 8
    for part in ("metrics", "baseline", "no_routing", "majority"):
        accuracy = result[part]["accuracy"] * result["test_texts"]
        assert abs(accuracy - round(accuracy)) < 1e-9 and 0 <= accuracy <= result["test_texts"], part
    assert result["no_routing"]["params_active"] < result["params_active"] < result["params_total"]
    assert set(result["validation"]) == {"accuracy", "loss"}
    assert (finished / "report.html").exists() and (finished / "no_routing" / "result.json").exists()
    records = checkpoint.read(finished).records
    assert "load" in records and abs(records["final_memory_load"].sum() - 1) < 1e-6
    assert 0 < result["edges"]["usage"] <= 1 and 0 < result["edges"]["kept"] <= 1
    model = load(finished)
    assert isinstance(model, MocaForSequenceClassification) and (model.votes.rarity > 0).any()
    assert load(finished / "no_routing").model.layers[0].memory is None


def test_evaluate_scores_the_same(finished, capsys):
    assert run("moca_text", "--evaluate", finished) == 0
    out = capsys.readouterr().out
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    assert f"model: {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}" in out
    assert "TF-IDF + logistic regression" in out and "chance: 0.5000" in out


@pytest.mark.slow
def test_a_resumed_run_has_the_same_losses(finished, texts, tmp_path):
    flags = [*SMALL, "--dataset", texts, "--out_dir", tmp_path, "--lr_scheduler_type=constant_with_warmup"]
    flags += ["--compare=false", "--budget_begin=0", "--budget_end=0"]
    assert run("moca_text", *flags, "--max_steps=8", "--run_name=whole") == 0
    assert run("moca_text", *flags, "--max_steps=4", "--run_name=parts") == 0
    assert run("moca_text", "--resume", "--out_dir", tmp_path, "--run_name=parts", "--max_steps=8") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_without_n_grams_and_without_routing(texts, tmp_path):
    flags = [*SMALL, "--dataset", texts, "--out_dir", tmp_path, "--max_steps=2", "--num_experts=1"]
    assert run("moca_text", *flags, "--num_slots=0", "--num_ngrams=0") == 0
    result = json.loads((tmp_path / "moca_text" / "result.json").read_text())
    assert "no_routing" not in result and result["params_active"] == result["params_total"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_ngrams=7"], "--num_ngrams: value cannot be used; expected an even number"),
        (["--slots_per_token=5"], "--slots_per_token: value cannot be used; expected from 1 to 4"),
        (["--num_heads=3"], "--num_heads"),
        (["--top_k=9"], "--top_k"),
        (["--budget_begin=0.9"], "--budget_begin"),
        (["--label_smoothing=1"], "--label_smoothing"),
        (["--dataset=sst2", "--data_dir=/no/such"], "sst2"),
        (["--dataset={one}"], "nothing to tell apart; expected rows of at least two classes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags(flags, message, texts, tmp_path, capsys):
    one = tmp_path / "one.tsv"
    one.write_text("".join(f"text {number}\tonly\n" for number in range(30)), encoding="utf-8")
    flags = [flag.format(one=one) for flag in flags]
    assert run("moca_text", *SMALL, "--dataset", texts, "--out_dir", tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "moca_text").exists()


def test_evaluating_on_other_classes(finished, tmp_path, capsys):
    other = tmp_path / "other.tsv"
    other.write_text("".join(f"text {n}\t{'xy'[n % 2]}\n" for n in range(40)), encoding="utf-8")
    assert run("moca_text", "--evaluate", finished, "--dataset", other) == 2
    assert "--dataset: texts of other classes" in capsys.readouterr().err
