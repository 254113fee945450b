"""The ablation: one change an arm, equal active parameters, seeds in turn, stopping and going on."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from command_line import SMALL, run

from graphmoe import checkpoint
from graphmoe.data import load_text
from graphmoe.models.cost import forward_flops
from graphmoe.train.command import Stopped
from recipes import language_model
from recipes.language_model_config import build_model
from recipes.moc_ablate import AblateConfig, changes_of, matched_arms
from recipes.moc_lm import MocConfig

ARMS = ["moc", "R0", "capacity1.25", "moe"]
FLAGS = [*SMALL, "--max_steps=3", "--num_seeds=2", "--expert_dim=32", "--sample_tokens=0", "--eval_every=3"]
FLAGS = [*FLAGS, "--final_windows=8"]
ONE_AT_A_TIME = {
    "R0", "R1", "R4", "S1", "S4", "k1", "k4", "E4", "E16", "no_mediator", "capacity1.25", "narrow", "alone",
    "moe", "dense", "moe_flops",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("moc_ablate", *FLAGS, "--dataset", corpus, "--out_dir", out, "--arms", *ARMS) == 0
    return out / "moc_ablate"


def test_what_it_leaves(finished):
    files = {path.name for path in finished.iterdir() if path.is_file()}
    assert files >= {"config.yaml", "tuning.json", "result.json", "comparison.md", "comparison.csv"}
    assert files >= {"comparison.png", "trade_off.png"}
    runs = {path.parent.name for path in finished.glob("*/result.json")}
    assert runs == {f"{arm}-lr0.004-seed{seed}" for arm in ARMS for seed in (0, 1)}
    results = {name: json.loads((finished / name / "result.json").read_text()) for name in runs}
    dropped = {name for name, result in results.items() if "drop_rate" in result["experts"]}
    assert dropped == {f"capacity1.25-lr0.004-seed{seed}" for seed in (0, 1)}
    assert len({result["seed"] for result in results.values()}) == 2
    table = (finished / "comparison.md").read_text()
    assert all(f"\n| {arm} " in table for arm in ARMS) and "against moe" in table
    assert "FLOPs per token" in table and "dropped / random" in table and "mediator gate" in table
    result = json.loads((finished / "result.json").read_text())
    assert set(result["metrics"]) == set(ARMS)
    losses = [results[f"moc-lr0.004-seed{seed}"]["metrics"]["loss"] for seed in (0, 1)]
    assert result["metrics"]["moc"] == pytest.approx(sum(losses) / 2)


def test_an_arm_is_a_run_of_moc_lm(finished, capsys):
    path = finished / "moc-lr0.004-seed1"
    loss = json.loads((path / "result.json").read_text())["metrics"]["loss"]
    assert run("moc_lm", "--evaluate", path) == 0
    assert f"model: loss {loss:.4f}, " in capsys.readouterr().out


def test_all_arms_have_one_seed_before_any_has_two(finished):
    times = {path.parent.name: path.stat().st_mtime_ns for path in finished.glob("*/config.yaml")}
    order = sorted(times, key=times.__getitem__)
    assert order == [f"{arm}-lr0.004-seed{seed}" for seed in (0, 1) for arm in ARMS]


def config_of(**options):
    sizes = {"tokenizer": "bytes", "embed_dim": 32, "num_layers": 2, "num_heads": 2, "expert_dim": 64}
    return AblateConfig(**sizes, **options)


@pytest.mark.parametrize("options", [{}, {"grid": True}], ids=["one at a time", "grid"])
def test_arms_have_equal_cost(options, corpus):
    text = load_text(corpus, tokenizer="bytes")
    config = config_of(**options)
    arms = matched_arms(config, text)
    with torch.device("meta"):
        models = {name: build_model(arm, text) for name, arm in arms.items()}
    active = {name: model.num_active_parameters() for name, model in models.items()}
    flops = {name: forward_flops(model, config.seq_len) for name, model in models.items()}
    assert arms["moc"].expert_dim == 64
    assert abs(flops["moe_flops"] / flops["moc"] - 1) < 0.01 < active.pop("moe_flops") / active["moc"] - 1
    assert all(abs(value / active["moc"] - 1) < 0.01 for value in active.values()), active
    assert max(flops["moe"], flops["dense"]) < flops["moc"]


def differences(arm):
    """The settings of an arm that are not those of the default, without the width of experts."""
    default = dataclasses.asdict(MocConfig(num_layers=3))
    names = {"max_steps", "eval_every", "eval_windows", "final_windows", "keep_checkpoints", "sample_tokens"}
    names |= {"tokenizer", "embed_dim", "num_layers", "num_heads", "expert_dim"}
    return {k: v for k, v in dataclasses.asdict(arm).items() if k not in names and v != default[k]}


def test_an_arm_changes_one_thing(corpus):
    text = load_text(corpus, tokenizer="bytes")
    arms = matched_arms(config_of(), text)
    assert set(arms) == {"moc"} | ONE_AT_A_TIME
    assert differences(arms["moc"]) == {}
    changed = {name: differences(arm) for name, arm in arms.items()}
    assert changed["R0"] == {"coupling_layers": 0} and changed["R4"] == {"coupling_layers": 4}
    assert changed["S1"] == {"reasoning_steps": 1} and changed["k4"] == {"top_k": 4}
    assert changed["E16"] == {"num_experts": 16} and changed["no_mediator"] == {"collab_mediator": False}
    assert changed["capacity1.25"] == {"capacity_factor": 1.25} and changed["narrow"] == {"collab_dim": 16}
    assert changed["alone"] == {"collab_graph": "self"}
    plain = {"coupling": "none", "coupling_layers": None, "reasoning_steps": 0, "fusion": "sum"}
    assert changed["moe"] == changed["moe_flops"] == plain
    assert changed["dense"] == plain | {"num_experts": 1, "top_k": 1}


def test_the_grid_is_whole_and_has_nothing_twice():
    arms = {name: MocConfig(**changes) for name, changes in changes_of(config_of(grid=True)).items()}
    arms["moc"] = MocConfig()
    settings = [
        (arm.coupling_layers, arm.collab_mediator and arm.coupling_layers > 0, arm.reasoning_steps, arm.top_k)
        for name, arm in arms.items()
        if name not in ("moe", "moe_flops", "dense")
    ]
    rounds = [(0, False), *((r, m) for r in (1, 2, 4) for m in (False, True))]
    assert sorted(settings) == sorted((r, m, s, k) for r, m in rounds for s in (1, 2, 4) for k in (1, 2, 4))


def test_another_default_has_other_arms():
    changes = changes_of(
        config_of(coupling_layers=4, collab_mediator=False, capacity_factor=2.0, num_experts=3)
    )
    assert "R4" not in changes and changes["R2"] == {"coupling_layers": 2}
    assert changes["mediator"] == {"collab_mediator": True} and "no_mediator" not in changes
    assert "k4" not in changes and "capacity1.25" not in changes
    assert changes_of(config_of(diversity_coef=0.1))["R0"]["diversity_coef"] == 0


def test_stopped_and_resumed_gives_the_same_table(finished, corpus, tmp_path, monkeypatch, capsys):
    train, calls = language_model.train, []

    def stop_in_the_sixth(config, *args, **options):
        calls.append(config.run_name)
        if len(calls) == 6:
            raise Stopped(signal.SIGTERM)
        return train(config, *args, **options)

    monkeypatch.setattr(language_model, "train", stop_in_the_sixth)
    flags = [*FLAGS, "--dataset", corpus, "--out_dir", tmp_path, "--arms", *ARMS]
    assert run("moc_ablate", *flags) == 143
    capsys.readouterr()
    assert run("moc_ablate", "--evaluate", tmp_path / "moc_ablate") == 0  # what is finished can be looked at
    table = capsys.readouterr().out
    assert "| moc " in table and "(1) |" in table and "(2) |" not in table
    assert run("moc_ablate", "--resume", "--out_dir", tmp_path) == 0
    assert "run 7 of 8" in capsys.readouterr().out
    assert len(calls) == len(set(calls)) + 1 == 9  # the stopped run twice, the others once
    results = [json.loads((path / "result.json").read_text()) for path in (finished, tmp_path / "moc_ablate")]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_run_that_was_cut_goes_on(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "moc_ablate")
    cut = tmp_path / "moc_ablate" / "moc-lr0.004-seed1"
    (cut / "result.json").unlink()
    capsys.readouterr()
    assert run("moc_ablate", "--resume", "--out_dir", tmp_path) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    a, b = (
        json.loads((path / "moc-lr0.004-seed1" / "result.json").read_text())["metrics"]["loss"]
        for path in (finished, tmp_path / "moc_ablate")
    )
    assert a == b


def test_learning_rates_are_chosen_on_other_text(corpus, tmp_path):
    flags = [*FLAGS, "--num_seeds=1", "--learning_rates", "1e-3", "8e-3", "--arms", "moc"]
    assert run("moc_ablate", *flags, "--dataset", corpus, "--out_dir", tmp_path) == 0
    tuning = json.loads((tmp_path / "moc_ablate" / "tuning.json").read_text())
    losses = tuning["losses"]["moc"]
    assert losses[f"{tuning['best']['moc']:g}"] == min(losses.values()) < max(losses.values())
    assert "against" not in (tmp_path / "moc_ablate" / "comparison.md").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "R3"], "--arms: value cannot be used; expected different ones of moc, R0, R1, R4, S1"),
        (["--arms", "moc", "moc"], "--arms"),
        (["--arms", "R0", "--grid"], "--arms"),
        (["--num_seeds=0"], "--num_seeds"),
        (["--learning_rates", "0"], "--learning_rates"),
        (["--coupling=none"], "--coupling"),
        (["--moc_collab_steps=0"], "--coupling"),
        (["--top_k=9"], "--top_k"),
        (["--expert_dim=1", "--arms", "R0", "k4"], "--expert_dim"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, corpus, tmp_path, capsys):
    assert run("moc_ablate", *FLAGS, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "runs").exists()


def test_nothing_finished_is_said(tmp_path, capsys):
    checkpoint.write_json(tmp_path / "tuning.json", {"losses": {}, "best": {"moc": 4e-3}})
    (tmp_path / "config.yaml").write_text("recipe: moc_ablate\n")
    assert run("moc_ablate", "--evaluate", tmp_path) == 2
    assert "no run is finished" in capsys.readouterr().err
