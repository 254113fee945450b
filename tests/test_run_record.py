"""The record of a run: read whole or refused, whatever is in its files."""

import re

import numpy as np
import pytest
import torch

from graphmoe import files
from graphmoe.errors import CheckpointError
from graphmoe.files import write_json
from graphmoe.run_record import read, truncate_metrics, write_records


def make_run(run):
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: ghost_lm\nlearning_rate: 0.001\nrun_name: null\n")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    return run


def test_read_a_run_from_either_folder(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    series = torch.arange(12.0).view(3, 4)
    tensors = {
        "load": series,
        "other": series[:, :2],
        "step": np.arange(6)[::2],
        "half": torch.ones(2).bfloat16(),
    }
    write_records(run / "records.safetensors", tensors, {"recipe": "ghost_lm", "k": "3"})
    write_json(run / "result.json", {"steps": 2})
    step_dir = run / "step-00000002"
    step_dir.mkdir()
    for path in (run, str(run), step_dir):
        record = read(path)
        assert record.path == run
        assert record.config == {"recipe": "ghost_lm", "learning_rate": 0.001, "run_name": None}
        assert [metric["step"] for metric in record.metrics] == [1, 2]
        assert record.meta == {"recipe": "ghost_lm", "k": "3"} and record.result == {"steps": 2}
        assert {k: v.tolist() for k, v in record.records.items()} == {
            "load": series.tolist(),
            "other": series[:, :2].tolist(),
            "step": [0, 2, 4],
            "half": [1.0, 1.0],
        }
        assert record.records["step"].dtype == np.int64 and record.records["load"].flags.writeable
    monkeypatch.chdir(step_dir)
    assert read(".").result == {"steps": 2}


def test_read_an_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert read(run)[2:] == ([], {}, {}, None)
    with pytest.raises(CheckpointError, match=r"this is not a run; expected a folder with config\.yaml"):
        read(tmp_path)


def test_half_a_last_line_is_ignored_and_a_bad_earlier_one_is_not(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    assert [metric["step"] for metric in read(run).metrics] == [1, 2]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 3: malformed JSON"):
        read(run)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"kind": "train"}\n')
    with pytest.raises(CheckpointError, match="line 2: metric has no step"):
        read(run)


def test_truncate_metrics(tmp_path):
    run = make_run(tmp_path / "run")
    kept = (run / "metrics.jsonl").read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 3}\n{"kind": "train", "st')
    truncate_metrics(run, 2)
    assert (run / "metrics.jsonl").read_bytes() == kept
    truncate_metrics(tmp_path, 2)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "name, data",
    [
        ("config.yaml", b"a: !!python/object/apply:os.system ['touch pwned']"),
        ("config.yaml", b"a: &x [1]\nb: *x\n"),
        ("config.yaml", b"[" * 5000),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"a: \x01\n"),
        ("config.yaml", b"a: 2024-99-99\n"),
        ("result.json", b"[1]"),
        ("result.json", b"[" * 100_000),
        ("result.json", b"9" * 5000),
        ("metrics.jsonl", b"1\n"),
        ("records.safetensors", b"\xff" * 100),
    ],
)
def test_hostile_run_files_are_typed_errors(tmp_path, monkeypatch, name, data):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read(run)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "kind, name", [("yaml", "config.yaml"), ("metrics", "metrics.jsonl"), ("json", "result.json")]
)
def test_sizes_are_bounded(tmp_path, monkeypatch, kind, name):
    run = make_run(tmp_path / "run")
    write_json(run / "result.json", {"steps": 2})
    monkeypatch.setitem(files.LIMITS, kind, 8)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)}: file is too large; expected at most 8 bytes"
    ):
        read(run)
