"""Recipes from the outside: command lines, exit codes, what lies on disk, and what bad input leaves there."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_line import GHOSTS, ROOT, SMALL, command, losses, run

import graphmoe
from graphmoe import checkpoint


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run of ghost_lm and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, *GHOSTS, "--dataset", corpus, "--out_dir", out, "--max_steps=12", "--save_every=4"]
    done = subprocess.run(command("ghost_lm", *flags), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return out / "ghost_lm", done.stdout + done.stderr


def test_a_run_leaves_what_it_promises(finished):
    run_dir, printed = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "records.safetensors",
        "result.json",
        "report.html",
        "plots",
    } <= names
    assert {path.stem for path in (run_dir / "plots").iterdir()} >= {
        "training_curves", "expert_load", "expert_connections", "ghost_timeline"
    }  # fmt: skip
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result) >= {
        "recipe", "metrics", "chance", "baseline", "seconds", "steps", "peak_rss_mb", "params_total",
        "params_active", "seed", "dataset", "device", "versions",
    }  # fmt: skip
    assert set(result["metrics"]) == {"bits_per_byte", "perplexity", "loss", "tokens_per_second"}
    assert result["baseline"]["bits_per_byte"] < result["chance"]["bits_per_byte"]
    assert result["steps"] == 12 and result["params_active"] < result["params_total"]
    first = result["ghosts"][0]
    assert first["activating"] is not None and first["active"] is not None
    assert "bits per byte than the unigram model" in printed and "dormant until step" in printed
    assert "sample: " in printed


def test_its_checkpoint_is_a_transformers_model_with_a_tokenizer(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import graphmoe.models

    run_dir, _ = finished
    step = checkpoint.latest(run_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(step), AutoTokenizer.from_pretrained(step)
    ids = tokenizer("import ", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.size(1) + 4)
    ours = graphmoe.load(run_dir)
    assert torch.equal(ours(ids).logits, graphmoe.load(step)(ids).logits)
    assert ours.moe_layers()[0].ghosts.phase[0] == 2
    assert "ghost_timeline" in graphmoe.visualize(step)


def test_evaluate_scores_the_same_and_samples(finished, capsys):
    run_dir, _ = finished
    assert run("ghost_lm", "--evaluate", run_dir) == 0
    result = json.loads((run_dir / "result.json").read_text())
    assert f"model: loss {result['metrics']['loss']:.4f}" in capsys.readouterr().out
    assert run("ghost_lm", "--evaluate", run_dir, "--sample", "def f(") == 0
    assert capsys.readouterr().out.startswith("def f(|")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_and_resumed_gives_the_same_losses(finished, corpus, tmp_path, signum, code):
    whole, _ = finished
    flags = [*SMALL, *GHOSTS, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=12", "--save_every=4"]
    process = subprocess.Popen(
        command("ghost_lm", *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "ghost_lm").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signum)
    error = process.communicate()[1]
    assert process.returncode in (code, 0), error  # 0: it was faster than the signal
    assert run("ghost_lm", "--resume", "--out_dir", tmp_path) == 0
    resumed = losses(tmp_path / "ghost_lm")  # a clean stop logs its last step as well
    assert {step: resumed[step] for step in losses(whole)} == losses(whole)
    a, b = (graphmoe.load(path).state_dict() for path in (whole, tmp_path / "ghost_lm"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recipe", ["moe_lm", "dense_lm", "expert_choice_lm"])
def test_baselines_run(recipe, corpus, tmp_path):
    assert run(recipe, *SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2") == 0
    result = json.loads((tmp_path / recipe / "result.json").read_text())
    assert result["steps"] == 2 and "ghosts" not in result
    assert (tmp_path / recipe / "report.html").exists()


def test_flag_beats_yaml_beats_default(corpus, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nseed: 5\nmax_steps: 2\n")
    flags = [*SMALL, tmp_path / "c.yaml", "--seed=6", "--dataset", corpus, "--out_dir", tmp_path / "out"]
    assert run("moe_lm", *flags) == 0
    config = yaml.safe_load((tmp_path / "out" / "moe_lm" / "config.yaml").read_text())
    assert (config["learning_rate"], config["seed"], config["max_steps"]) == (1e-3, 6, 2)
    assert config["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_expert=4"], "did you mean --num_experts"),
        (["--top_k=9"], "--top_k: k must not exceed the number of experts; expected 1 <= k <= 6; got 9"),
        (["--num_heads=3"], "--num_heads: heads must divide"),
        (["--num_kv_heads=4"], "--num_kv_heads"),
        (["--dataset=/no/such/corpus"], "/no/such/corpus"),
        (["--dataset={empty}"], "empty"),
        (["--seq_len=1000000"], "sequence"),
        (["--coupling=mesh"], "expected one of none, gnn, hyper, collab; got 'mesh'"),
        (["--hyperedge_strategy=all_triplets", "--top_k=2"], "all_triplets needs more rows"),
        (["--device=cuda"], "--device"),
        (["--learning_rate=fast"], "--learning_rate"),
        (["--run_name=../elsewhere"], "--run_name"),
        (["--config={empty}/none.yaml"], "none.yaml"),
        (["--resume"], "resume"),
        (["--evaluate=/no/such/run"], "/no/such/run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, corpus, tmp_path, capsys):
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    (tmp_path / "empty").mkdir()
    flags = [flag.format(empty=tmp_path / "empty") for flag in flags]
    code = run("ghost_lm", *SMALL, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_never_overwritten(finished, capsys):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert run("ghost_lm", *SMALL, "--out_dir", run_dir.parent, "--max_steps=2") == 2
    assert "run exists; expected --resume, --overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_damaged_checkpoint_is_named(finished, capsys, tmp_path):
    run_dir, _ = finished
    copy = tmp_path / "ghost_lm"
    shutil.copytree(run_dir, copy)
    for step in copy.glob("step-*"):
        data = bytearray((step / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (step / "model.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match=r"model\.safetensors"):
        assert run("ghost_lm", "--resume", "--out_dir", tmp_path) == 2
    assert "error: " in capsys.readouterr().err
    assert list(copy.glob("damaged-step-*"))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(finished, corpus, tmp_path):
    """Whatever moment SIGKILL hits, the run resumes by itself to the losses of one never stopped."""
    whole, _ = finished
    flags = [*SMALL, *GHOSTS, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=12", "--save_every=1"]
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        begun = (tmp_path / "ghost_lm" / "config.yaml").exists()
        process = subprocess.Popen(
            command("ghost_lm", *flags, *(["--resume"] if begun else [])),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(4, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        assert losses(tmp_path / "ghost_lm") == losses(whole)
        shutil.rmtree(tmp_path / "ghost_lm")
