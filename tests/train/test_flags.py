"""Flags: what is given, spellings, suggestions, errors of one line."""

import sys
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest

from graphmoe.errors import ConfigError
from graphmoe.train.config import flag
from graphmoe.train.flags import read_flags

PROG = "python -m recipes.toy"


@dataclass(kw_only=True)
class Toy:
    max_steps: int = flag(7, "optimiser steps")
    batch_size: int = flag(16, "sequences")
    num_experts: int = flag(8, "experts a layer", aliases=["--experts"])
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    gate: bool = flag(True, "whether to gate")
    bf16: bool = flag(False, "whether to compute in bfloat16")
    dims: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "channels"})


def flags(*argv):
    return read_flags(Toy, argv, prog=PROG, description="A toy.")


def test_only_what_is_given_is_returned():
    assert flags() == {}
    assert flags("--max_steps", "7") == {"max_steps": 7}  # also when it is the default
    assert flags("--batch-size=2", "--experts", "4") == {"batch_size": 2, "num_experts": 4}
    assert flags("--bf16", "--no_gate", "--dims", "3", "4") == {"bf16": True, "gate": False, "dims": [3, 4]}
    assert flags("--bf16", "no") == {"bf16": False}


@pytest.mark.parametrize(
    "argv", [["a.yaml", "--bf16"], ["--max_steps", "1", "a.yaml"], ["--config", "a.yaml"]]
)
def test_config_may_be_positional_anywhere(argv):
    assert flags(*argv)["config"] == "a.yaml"


def test_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--max_steps", "4"])
    assert read_flags(Toy, None, prog=PROG, description="") == {"max_steps": 4}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_expert", "3"], "unknown flag --num_expert; did you mean --num_experts?"),
        (["--num-expert=3"], "unknown flag --num-expert; did you mean --num_experts?"),
        (["--max_step", "3"], "unknown flag --max_step; did you mean --max_steps?"),
        (["--zzz"], "unknown flag --zzz"),
        (["--max_steps", "x"], "--max_steps: invalid int value: 'x'"),
        (["--max_steps", "1.5"], "--max_steps: invalid int value: '1.5'"),
        (["--max_steps"], "--max_steps: expected one argument"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--bf16", "perhaps"], "--bf16: Truthy value expected"),
        (["a.yaml", "b.yaml"], "unexpected argument; expected at most one config file; got 'b.yaml'"),
        (["--config", "a.yaml", "b.yaml"], "unexpected argument; expected at most one config file"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, capfd):
    with pytest.raises(ConfigError) as caught:
        flags(*argv)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_help_prints_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and text.startswith(f"usage: {PROG}")
    for name in asdict(Toy()):
        assert f"--{name}" in text
    assert "experts a layer (default: 8)" in text and "--experts" in text and "--config FILE.yaml" in text
    assert text.count("(default: ") >= len(asdict(Toy()))
