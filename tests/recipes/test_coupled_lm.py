"""One flag chooses the architecture; the flags of the original spell the same settings."""

import dataclasses
import json

import pytest
import torch
import yaml
from command_line import SMALL, run

import graphmoe
from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from recipes import dense_lm, ghost_lm, gnn_lm, hgnn_lm, moe_lm, orthogonal_lm
from recipes.coupled_lm import CoupledConfig
from recipes.hgnn_lm import HgnnConfig
from recipes.phases import MODES

RECIPES = {
    "dense": dense_lm,
    "moe": moe_lm,
    "gnn": gnn_lm,
    "hgnn": hgnn_lm,
    "orthogonal": orthogonal_lm,
    "ghost": ghost_lm,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_the_recipe_of_its_name(mode):
    config, recipe = CoupledConfig(architecture_mode=mode), MODES[mode]()
    for field in dataclasses.fields(recipe):
        assert getattr(config, field.name) == getattr(recipe, field.name), field.name


@pytest.mark.parametrize("mode", RECIPES)
def test_every_mode_trains_like_its_recipe(mode, corpus, tmp_path):
    flags = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2"]
    assert run("coupled_lm", *flags, "--architecture_mode", mode) == 0
    name = RECIPES[mode].__name__.rpartition(".")[2]
    assert run(name, *flags) == 0
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("coupled_lm", name)]
    for key in ("params_total", "params_active", "flops_per_token"):
        assert results[0][key] == results[1][key]
    assert results[0]["metrics"]["loss"] == results[1]["metrics"]["loss"]
    assert (mode == "dense") == ("experts" not in results[0])


def test_alone_is_hgnn_without_talk(corpus, tmp_path):
    flags = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2", "--architecture_mode=alone"]
    assert run("coupled_lm", *flags) == 0
    layer = graphmoe.load(tmp_path / "coupled_lm").moe_layers()[0]
    assert torch.equal(layer.connections(), torch.eye(6))
    coupled = HgnnConfig()
    alone = CoupledConfig(architecture_mode="alone")
    differ = {
        f.name for f in dataclasses.fields(coupled) if getattr(coupled, f.name) != getattr(alone, f.name)
    }
    assert differ == {"hyperedges", "hyperedge_strategy"}


def test_flags_of_the_original(corpus, tmp_path):
    flags = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2", "--run_name=my_ghost_run"]
    flags += ["--architecture_mode", "ghost", "--num_experts=4", "--ghost_num_ghost_experts=3"]
    assert run("coupled_lm", *flags, "--hgnn_strategy=all_triplets", "--ghost_activation_threshold=0.02") == 0
    config = yaml.safe_load((tmp_path / "my_ghost_run" / "config.yaml").read_text())
    chosen = ("num_ghosts", "hyperedge_strategy", "ghost_activation_threshold", "coupling")
    assert [config[name] for name in chosen] == [3, "all_triplets", 0.02, "hyper"]
    assert graphmoe.load(tmp_path / "my_ghost_run").moe_layers()[0].num_ghosts == 3


def test_every_option_by_yaml(corpus, tmp_path):
    options = {
        "architecture_mode": "ghost", "num_experts": 4, "top_k": 3, "num_ghosts": 1,
        "hyperedges": "0,1,4;1,2,3;2,4",
        "hyperedge_attention": True, "coupling_scale": 0, "coupling_layers": 2, "fusion": "mean",
        "fusion_projection": True, "ghost_lr_schedule": "inverse", "ghost_learning_rate": "1e-3",
        "orthogonality_adaptive": True, "orthogonality_schedule": "step", "orthogonality_interval": 2,
        "epochs": "0.02", "ghost_window": 1, "ghost_rate": 0.5,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
    assert run("coupled_lm", *SMALL, "--dataset", corpus, "--out_dir", tmp_path, tmp_path / "c.yaml") == 0
    run_dir = tmp_path / "coupled_lm"
    layer = graphmoe.load(run_dir).moe_layers()[1]
    assert layer.couplers[1].hyperedge_index.tolist() == [[0, 1, 4, 1, 2, 3, 2, 4], [0, 0, 0, 1, 1, 1, 2, 2]]
    record = checkpoint.read(run_dir)
    assert record.config["hyperedge_strategy"] == "custom" and record.config["max_steps"] < 20
    assert {"ghost_learning_rate", "orthogonality_strength", "specialisation"} <= set(record.records)
    assert {"final_cka", "final_mutual_information"} <= set(record.records)
    strength = record.records["orthogonality_strength"]
    assert ((strength >= 1e-3) & (strength <= 0.3 + 1e-7)).all()


def test_resume_goes_on_in_the_same_mode(corpus, tmp_path):
    flags = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--architecture_mode=gnn", "--save_every=2"]
    assert run("coupled_lm", *flags, "--max_steps=2") == 0
    assert run("coupled_lm", "--out_dir", tmp_path, "--resume", "--max_steps=4") == 0
    config = yaml.safe_load((tmp_path / "coupled_lm" / "config.yaml").read_text())
    assert (config["architecture_mode"], config["coupling"]) == ("gnn", "gnn")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--architecture_mode=mesh"], "--architecture_mode"),
        (
            ["--architecture_mode=gnn", "--coupling=hyper"],
            "--coupling: not what --architecture_mode gnn means",
        ),
        (["--architecture_mode=hgnn", "--num_ghosts=2"], "--num_ghosts: not what"),
        (
            ["--architecture_mode=moe", "--orthogonality_output_coef=0.1"],
            "--orthogonality_output_coef: not what",
        ),
        (["--architecture_mode=dense", "--num_experts=4"], "--num_experts: not what"),
        (["--num_experts=2", "--top_k=2", "--hgnn_strategy=all_triplets", "--num_ghosts=0"], "all_triplets"),
        (["--hyperedges=0,1;2,9"], "--hyperedges"),
        (["--hyperedges=0,1;;2,3"], "--hyperedges"),
        (["--hyperedges=0,one"], "--hyperedges: not a list of hyperedges"),
        (["--hgnn_strategy=custom"], "--hyperedges"),
        (["--num_ghosts=4", "--max_hyperedges=20"], "--num_ghosts"),
        (["--max_hyperedges=3"], "--max_hyperedges"),
        (["--ghost_rate=-0.1"], "--ghost_rate"),
        (["--ghost_learning_rate=-1"], "--ghost_learning_rate"),
        (["--ghost_lr_schedule=up"], "--ghost_lr_schedule"),
        (["--orthogonality_output_coef=-1"], "--orthogonality_output_coef"),
        (["--orthogonality_schedule=sometimes", "--orthogonality_adaptive"], "--orthogonality_schedule"),
        (["--orthogonality_decay=0", "--orthogonality_adaptive"], "--orthogonality_decay"),
        (["--coupling_layers=0"], "--coupling_layers"),
        (["--fusion=max"], "--fusion"),
        (["--epochs=0"], "--epochs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, corpus, tmp_path, capsys):
    assert run("coupled_lm", *SMALL, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "runs").exists()


def test_a_mode_that_is_built_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="not what --architecture_mode gnn means"):
        CoupledConfig(architecture_mode="gnn", coupling="none")
