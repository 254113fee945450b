"""Settings of a run: precedence, ranges, and the way to disk and back."""

import re
import subprocess
import sys
from dataclasses import MISSING, asdict, dataclass, field
from typing import Literal

import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.train.config import (
    RunConfig,
    changed,
    flag,
    from_run,
    open_run,
    parse,
    to_yaml,
)

PROG = "python -m recipes.toy"


@dataclass
class Toy(RunConfig):
    max_steps: int = flag(7, "optimiser steps")
    num_experts: int = flag(8, "experts a layer", aliases=["--experts"])
    coupling: Literal["none", "gnn"] = flag("gnn", "how experts talk")
    gate: bool = flag(True, "whether to gate")
    dims: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "channels"})
    rates: list[float] | None = field(default=None, metadata={"help": "one rate a layer"})
    capacity: int | str = flag("auto", "rows an expert may take")
    note: str | None = flag(None, "free text")


@dataclass(kw_only=True)
class Needy(RunConfig):
    size: int = flag(MISSING, "has no default")


def toy(*argv):
    return parse(Toy, argv, prog=PROG, description="A toy.")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config file.yaml"
        path.write_text(text)
        return str(path)

    return write


def make_run(folder, config=None, recipe="toy"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes(to_yaml(config or Toy(), recipe))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_defaults_and_name_of_the_run():
    config = toy()
    assert config == Toy(run_name="toy")
    assert config.max_steps == 7 and config.dims == [1, 2]
    assert toy("--run_name", "a b").run_name == "a b"


def test_words_of_the_original_system(file):
    words = "grad_clip: 0.5\nsave_interval: 11\nlog_interval: 3\nbeta1: 0.8\nbeta2: 0.9\n"
    words += "wandb_project: moe\nwandb_run_name: first\n"
    flags = [part for line in words.splitlines() for part in f"--{line}".split(": ")]
    for config in (toy(file(words)), toy(*flags)):
        assert (config.max_grad_norm, config.save_every, config.log_every) == (0.5, 11, 3)
        assert (config.track, config.track_project, config.run_name) == ("wandb", "moe", "first")
        assert (config.adam_beta1, config.adam_beta2) == (0.8, 0.9)


def test_a_project_alone_means_wandb(file):
    assert toy("--track_project=p").track == "wandb" and toy("--track=tensorboard").track_project is None
    assert toy("--track=tensorboard", "--track_project=p").track == "tensorboard"
    assert toy().track is None and toy(file("track: null\n")).track is None


def test_flag_beats_file_beats_run_beats_default(tmp_path, file):
    run = make_run(tmp_path / "runs" / "old", Toy(seed=1, batch_size=1, num_experts=1, learning_rate=0.3))
    path = file("seed: 2\nbatch-size: 2\nrun_name: old\n")
    place = ["--resume", "--out_dir", str(tmp_path / "runs")]
    config = toy("--config", path, "--seed", "3", *place)
    assert (config.seed, config.batch_size, config.num_experts, config.max_steps) == (3, 2, 1, 7)
    assert config.learning_rate == 0.3 and config.resume and open_run(config) == run
    assert changed(from_run(Toy, run), config) == ["batch_size", "seed"]
    scored = toy("--evaluate", str(run), "--batch_size", "9")
    assert (scored.seed, scored.batch_size, scored.run_name) == (1, 9, "toy")


def test_a_flag_equal_to_its_default_still_beats_the_file(file):
    path = file("max_steps: 3\ngate: false\nseed: 5\n")
    config = toy(path, "--max_steps", "7", "--gate", "true")
    assert (config.max_steps, config.gate, config.seed) == (7, True, 5)


def test_setting_without_default(file):
    def needy(*argv):
        return parse(Needy, argv, prog="needy", description="")

    assert needy("--size", "1") == needy(file("size: 1")) == Needy(size=1, run_name="needy")
    with pytest.raises(ConfigError, match=r"^--size: a value is required$"):
        needy()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["absent.yaml"], "absent.yaml: there is no such file"),
        (["--resume", "--out_dir", "absent"], "absent/toy: there is no run to resume"),
        (["--evaluate", "absent"], "absent: this is not a run; expected a folder with config.yaml"),
    ],
)
def test_what_is_not_there(argv, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        toy(*argv)


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0) for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "num_threads")],
        *[(name, 0) for name in ("eval_every", "save_every", "log_every", "keep_checkpoints")],
        ("warmup_steps", -1),
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
        ("min_lr_ratio", 1.5),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("momentum", 1.0),
        ("track_project", "a/b"),
        ("seed", -1),
        ("seed", 2**63),
        *[
            ("run_name", name)
            for name in ("", ".", "..", "a/b", "/a", ".hidden", "a..b", "a\\b", "a\nb", "a\0")
        ],
    ],
)
def test_values_out_of_range_name_the_flag(name, value):
    with pytest.raises(
        ConfigError, match=f"^--{name}: value cannot be used; expected .*; got {re.escape(repr(value))}"
    ):
        Toy(**{name: value})


def test_contradictions():
    with pytest.raises(ConfigError, match="--resume and --overwrite cannot be used together"):
        Toy(resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite and --evaluate cannot"):
        Toy(overwrite=True, evaluate="runs/a")


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^--device: torch finds no CUDA device"):
        toy("--device", "cuda")


ODD = Toy(
    learning_rate=0.1 + 0.2,
    weight_decay=1e-5,
    max_grad_norm=float("inf"),
    seed=2**62,
    gate=False,
    rates=[1e-7],
    capacity=3,
    note="null",
    data_dir="ä: b # c",
    run_name="010",
)


def test_config_of_a_run_comes_back_exactly(tmp_path):
    run = make_run(tmp_path / "moved", ODD)
    back = from_run(Toy, run)
    place = {"run_name": "moved", "out_dir": str(tmp_path)}
    assert asdict(back) == asdict(ODD) | place
    assert changed(back, ODD) == []
    text = (run / "config.yaml").read_text()
    assert text.startswith("recipe: toy\n") and len(text.splitlines()) > len(asdict(ODD))


def test_run_of_another_recipe(tmp_path):
    make_run(tmp_path / "toy", recipe="moe_lm")
    with pytest.raises(ConfigError, match="run belongs to another recipe; expected toy; got 'moe_lm'"):
        toy("--resume", "--out_dir", str(tmp_path))


def test_importing_the_config_takes_neither_torch_nor_transformers_with_it():
    code = "import sys, graphmoe.train.config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
