"""YAML configs: the type of the field decides, and what is no flat mapping is refused."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from graphmoe.errors import ConfigError
from graphmoe.train.config import flag
from graphmoe.train.yaml_config import read_config


@dataclass(kw_only=True)
class Toy:
    max_steps: int = flag(7, "optimiser steps")
    learning_rate: float = flag(1e-3, "peak learning rate")
    bf16: bool = flag(False, "whether to compute in bfloat16")
    num_experts: int = flag(8, "experts a layer", aliases=["--experts"])
    coupling: Literal["none", "gnn"] = flag("gnn", "how experts talk")
    dims: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "channels"})
    rates: list[float] | None = field(default=None, metadata={"help": "one rate a layer"})
    capacity: int | str = flag("auto", "rows an expert may take")
    note: str | None = flag(None, "free text")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config file.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    "line, value",
    [
        ("learning_rate: 1e-3", 1e-3),
        ("learning_rate: '3'", 3.0),
        ("learning_rate: 2", 2.0),
        ("learning_rate: .inf", float("inf")),
        ("max_steps: 010", 10),
        ("max-steps: 1_000", 1000),
        ("max_steps: '12'", 12),
        ("bf16: true", True),
        ("bf16: 'true'", True),
        ("bf16: Yes", True),
        ("bf16: off", False),
        ("note: 001", "001"),
        ("note: no", "no"),
        ("note: 2024-01-01", "2024-01-01"),
        ("note: null", None),
        ("note: 'null'", "null"),
        ("note: ''", ""),
        ("note:", None),
        ("coupling: none", "none"),
        ("dims: [3, 4]", [3, 4]),
        ("dims:\n- 3", [3]),
        ("dims: []", []),
        ("rates: [1e-3, 2]", [1e-3, 2.0]),
        ("rates: null", None),
        ("capacity: 5", 5),
        ("capacity: auto", "auto"),
    ],
)
def test_values_are_converted_by_the_type_of_the_field(file, line, value):
    values = read_config(Toy, file(line))
    (got,) = values.values()
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_steps: 1.5", "key max_steps has a value of another type; expected an integer; got '1.5'"),
        ("max_steps: 1e3", "key max_steps has a value of another type; expected an integer; got '1e3'"),
        ("max_steps: true", "expected an integer; got 'true'"),
        ("max_steps: null", "expected a single value; got 'null'"),
        ("max_steps: [1]", "expected a single value; got ['1']"),
        ("learning_rate: fast", "expected a number; got 'fast'"),
        ("bf16: perhaps", "expected true or false; got 'perhaps'"),
        ("coupling: hyper", "expected one of none, gnn; got 'hyper'"),
        ("coupling: [gnn]", "expected one of none, gnn; got ['gnn']"),
        ("dims: 3", "expected a list; got '3'"),
        ("dims: [x]", "expected an integer; got ['x']"),
        ("num_expert: 3", "unknown key num_expert; did you mean num_experts?"),
        ("config: a.yaml", "unknown key config"),
        ("num_experts: 3\nexperts: 4", "key num_experts appears twice"),
        ("model:\n  num_experts: 3\nexperts: 4", "key num_experts appears twice"),
        ("model:\n  num_expert: 3", "unknown key num_expert; did you mean num_experts?"),
        ("model: 3", "unknown key model"),
    ],
)
def test_unusable_values_name_the_file_and_the_key(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        read_config(Toy, path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("note: 1\nnote: 2", "line 2: file cannot be used as config: key note appears twice"),
        ("seed: {a: 1}", "line 1: file cannot be used as config: nested values are refused"),
        ("dims: [[1]]", "nested values"),
        ("model: {model: {note: x}}", "line 1: file cannot be used as config: nested values are refused"),
        ("model:\n  note: {a: 1}", "line 2: file cannot be used as config: nested values are refused"),
        ("model:\n  dims: [{a: 1}]", "nested values"),
        ("- model: {note: x}", "nested values"),
        ("model:\n  note: x\nnote: y", "line 3: file cannot be used as config: key note appears twice"),
        ("model:\n  note: x\n  note: y", "line 3: file cannot be used as config: key note appears twice"),
        ("model: {note: x}\nmodel: {bf16: true}", "line 2: file cannot be used as config: key model appears"),
        ("model: {? [a] : 1}", "a key has to be a word"),
        ("model: &m {note: x}", "anchors and aliases are refused"),
        ("a: " + "[" * 100_000, "nested values"),
        ("a: &x 1\nb: *x", "anchors and aliases are refused"),
        ("note: !!python/object/apply:os.getcwd []", "tags are refused"),
        ("- 1", "no list of `name: value` lines"),
        ("text", "no list of `name: value` lines"),
        ("[a]: 1", "a key has to be a word"),
        ("seed: 1\n---\nseed: 2", "but found another document"),
        ("seed: 'x", "found unexpected end of stream"),
        ("seed: \x01", "special characters are not allowed"),
        (b"note: \xff\xfe\xfd", "file cannot be used as config"),
        ("#" * 2**20 + "\n", "file is too large; expected at most 1048576 bytes"),
    ],
)
def test_files_that_are_no_config(file, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_config(Toy, file(text))
    assert "\n" not in str(caught.value)


def test_a_section_for_the_model_is_as_if_it_were_not_there(file):
    flat = "experts: 3\ndims: [4]\nlearning_rate: 1e-3\nbf16: yes\n"
    sections = "model:\n  experts: 3\n  dims: [4]\nlearning_rate: 1e-3\nbf16: yes\n"
    assert read_config(Toy, file(sections)) == read_config(Toy, file(flat)) != {}
    assert read_config(Toy, file("bf16: true\nmodel:\n  # nothing yet\n")) == {"bf16": True}
    assert read_config(Toy, file("bf16: true\nmodel: {}")) == {"bf16": True}


def test_nothing_and_no_file(file, tmp_path):
    assert read_config(Toy, file("# nothing\n")) == {}
    with pytest.raises(ConfigError, match="no such file"):
        read_config(Toy, tmp_path)
