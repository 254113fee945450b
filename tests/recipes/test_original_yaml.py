"""Files of the original systems: every key is understood, the run is the one they describe."""

import importlib.util
import json
import re

import numpy as np
import pytest
import yaml
from command_line import run

import graphmoe
from graphmoe.train.config import parse
from graphmoe.train.yaml_config import read_config
from recipes.moc_context_lm import MocContextConfig
from recipes.moc_lm import MocConfig

VERSION_2 = """
model:
  # Backbone
  vocab_size: 61
  d_model: 16
  n_layers: 1
  n_heads: 4
  n_kv_heads: 2
  max_seq_len: 12
  dropout: 0.05

  # MoC
  n_experts: 5
  top_k: 3
  capacity_factor: 1.25
  aux_loss_weight: 2.0e-2
  router_z_loss_weight: 2.0e-3
  router_noise_std: 0.5

  # Collaboration (message passing among experts)
  use_simple_collab: false
  use_moc_collab: true
  moc_collab_steps: 3
  moc_use_mediator: true
  moc_collab_heads: 2
  moc_collab_dropout: 0.125

  # IRL
  n_reasoning_steps: 3

  # Engineering
  use_gradient_checkpointing: true
  grad_ckpt_policy: block

data_dir: "data/"
learning_rate: 3.0e-4
weight_decay: 0.2
beta1: 0.8
beta2: 0.9
warmup_steps: 7
max_steps: 2

batch_size: 2
gradient_accumulation_steps: 3
grad_clip: 0.5

compile_model: false
device: "cpu"
out_dir: "checkpoints/moc"
save_interval: 5
log_interval: 1

wandb_project: "collaborating-experts"
wandb_run_name: "moc-16d-5x-top3-irl3-collab3"
"""
MEANT_2 = {
    "vocab_size": 61, "embed_dim": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "seq_len": 12,
    "dropout": 0.05, "num_experts": 5, "top_k": 3, "capacity_factor": 1.25, "router_aux_loss_coef": 2e-2,
    "router_z_loss_coef": 2e-3, "router_noise_std": 0.5, "coupling": "collab", "coupling_layers": 3,
    "collab_mediator": True, "collab_heads": 2, "collab_dropout": 0.125, "reasoning_steps": 3,
    "checkpoint_policy": "block", "data_dir": "data/", "dataset": ".", "learning_rate": 3e-4,
    "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "warmup_steps": 7, "max_steps": 2,
    "batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "compile_model": False,
    "device": "cpu", "out_dir": "checkpoints/moc", "save_every": 5, "log_every": 1, "track": "wandb",
    "track_project": "collaborating-experts", "run_name": "moc-16d-5x-top3-irl3-collab3", "router": "topk",
    "fusion": "gated",
}  # fmt: skip

VERSION_1 = """
model:
  d_model: 16
  n_layers: 2
  n_heads: 4
  n_kv_heads: 4
  vocab_size: 61
  max_seq_len: 12
  # --- MoC specific ---
  n_experts: 4
  top_k: 2
  aux_loss_weight: 0.1
  router_temperature: 0.7

data_dir: "data/"
out_dir: "checkpoints/moc-4e-2k"
learning_rate: 3.0e-4
max_steps: 2
batch_size: 2
gradient_accumulation_steps: 2
wandb_project: "collaborating-experts"
wandb_run_name: "moc-4-experts-2-topk"
"""
MEANT_1 = {
    "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 61, "seq_len": 12,
    "num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.1, "router_temperature": 0.7, "data_dir": "data/",
    "dataset": ".", "out_dir": "checkpoints/moc-4e-2k", "learning_rate": 3e-4, "max_steps": 2,
    "batch_size": 2, "gradient_accumulation_steps": 2, "track_project": "collaborating-experts",
    "run_name": "moc-4-experts-2-topk", "router": "contextual", "coupling": "collab", "coupling_layers": 1,
    "collab_mediator": False, "reasoning_steps": 0, "diversity_coef": 0.01, "checkpoint_policy": "none",
}  # fmt: skip
CASES = [
    ("moc_lm", MocConfig, VERSION_2, MEANT_2),
    ("moc_context_lm", MocContextConfig, VERSION_1, MEANT_1),
]
FEW = ["--num_threads=1", "--sample_tokens=4", "--eval_windows=4"]


def untracked(text: str) -> str:
    """Without the project of a tracker, which needs a package and an account."""
    return re.sub(r"wandb_project: .*\n", "", text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``data/`` in it, as the files expect it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for index, dtype in enumerate((np.uint16, np.int64, np.int32)):
        np.save(tmp_path / "data" / f"tokens_{index:03}.npy", draw.integers(0, 61, 400).astype(dtype))
    return tmp_path


@pytest.mark.parametrize("recipe, config_class, text, meant", CASES, ids=["v2", "v1"])
def test_every_key_means_what_it_meant(recipe, config_class, text, meant, here):
    (here / "train.yaml").write_text(text)
    config = parse(config_class, ["train.yaml"], prog=f"python -m recipes.{recipe}", description="")
    assert {name: getattr(config, name) for name in meant} == meant
    decided = {"use_simple_collab", "use_moc_collab", "use_gradient_checkpointing", "gradient_checkpointing"}
    assert set(read_config(config_class, "train.yaml")) <= set(meant) | decided


@pytest.mark.parametrize("recipe, config_class, text, meant", CASES, ids=["v2", "v1"])
def test_the_run_is_the_one_described(recipe, config_class, text, meant, here):
    (here / "train.yaml").write_text(untracked(text))
    assert run(recipe, "train.yaml", *FEW) == 0
    run_dir = here / meant["out_dir"] / meant["run_name"]
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    ours = {"checkpoint_policy", "track", "track_project"}
    assert {n: written[n] for n in meant if n not in ours} == {n: meant[n] for n in meant if n not in ours}
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == 2 and result["sample"] is None and result["metrics"]["bits_per_byte"] is None
    model = graphmoe.load(run_dir)
    words = {"embed_dim": "hidden_size", "num_layers": "num_hidden_layers", "top_k": "num_experts_per_tok"}
    words |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
    words |= {"seq_len": "max_position_embeddings"}
    for name, value in meant.items():
        word = words.get(name, name)
        if hasattr(model.config, word):
            assert getattr(model.config, word) == value, name
    assert model.config.checkpoint_policy == meant["checkpoint_policy"]
    assert run(recipe, "--evaluate", run_dir, "--decode_rounds=0") == 0


def test_a_flag_beats_the_file(here):
    (here / "train.yaml").write_text(VERSION_2)
    flags = ["train.yaml", "--n_experts=6", "--no_collab_mediator", "--use_moc_collab=false", "--dataset=x"]
    config = parse(MocConfig, flags, prog="python -m recipes.moc_lm", description="")
    assert (config.num_experts, config.collab_mediator, config.coupling) == (6, False, "none")
    assert config.dataset == "x"


def ids(values, dtype=np.int64):
    return np.asarray(values, dtype=dtype)


@pytest.mark.parametrize(
    "change, message",
    [
        (("d_model: 16", "d_modell: 16"), "unknown key d_modell; did you mean d_model?"),
        (("n_experts: 5", "n_experts: 5\n  embed_dim: 16"), "key embed_dim appears twice"),
        (("batch_size: 2", "batch_size: 2\nd_model: 16"), "key d_model appears twice"),
        (("batch_size: 2", "batch_size: 2\nembed_dim: 16"), "key embed_dim appears twice"),
        (("dropout: 0.05", "dropout: {p: 0.05}"), "nested values are refused"),
        (("data_dir:", "data:\n  data_dir:"), "nested values are refused"),
        (
            ("top_k: 3", "top_k: many"),
            "key top_k has a value of another type; expected an integer; got 'many'",
        ),
        (("n_kv_heads: 2", "n_kv_heads: 3"), "--num_kv_heads: key-value heads must divide the heads"),
        (("capacity_factor: 1.25", "capacity_factor: 0"), "--capacity_factor"),
        (("top_k: 3", "top_k: 6"), "--top_k: k must not exceed the number of experts"),
        (("use_simple_collab: false", "use_simple_collab: true"), "--use_simple_collab"),
        (("grad_ckpt_policy: block", "grad_ckpt_policy: all"), "key grad_ckpt_policy has a value"),
        (("vocab_size: 61", "vocab_size: 60"), "a token id is outside the vocabulary"),
        (ids([0.5] * 400, np.float32), "not an array of token ids"),
        (ids([[1, 2]] * 200), "not an array of token ids"),
        (ids([7] * 399 + [61]), "a token id is outside the vocabulary"),
        (ids([7] * 399 + [-1]), "a token id is negative"),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(change, message, here, capsys):
    text = untracked(VERSION_2)
    if isinstance(change, tuple):
        assert change[0] in text
        text = text.replace(*change)
    else:
        np.save(here / "data" / "tokens_001.npy", change)
    (here / "train.yaml").write_text(text)
    assert run("moc_lm", "train.yaml", *FEW) == 2
    error = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not (here / "checkpoints").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is here")
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(here, capsys):
    (here / "train.yaml").write_text(VERSION_2)
    assert run("moc_lm", "train.yaml", *FEW) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: --track") and "wandb" in error[0]
    assert not (here / "checkpoints").exists()


def test_only_a_folder_of_data_is_what_lies_in_it():
    assert MocConfig().dataset == "stdlib"
    assert MocConfig(data_dir="data/").dataset == "."
    assert MocConfig(data_dir="data/", dataset="stdlib").dataset == "stdlib"


def test_simple_collaboration_is_that_of_the_first_version(here):
    text = VERSION_2.replace("use_simple_collab: false", "use_simple_collab: true")
    (here / "train.yaml").write_text(text.replace("use_moc_collab: true", "use_moc_collab: false"))
    config = parse(MocConfig, ["train.yaml"], prog="python -m recipes.moc_lm", description="")
    assert (config.coupling, config.coupling_layers, config.collab_mediator) == ("collab", 1, False)
    (here / "train.yaml").write_text(VERSION_2.replace("use_moc_collab: true", "use_moc_collab: false"))
    config = parse(MocConfig, ["train.yaml"], prog="python -m recipes.moc_lm", description="")
    assert config.coupling == "none"
