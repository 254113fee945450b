"""Files: old or new content, never a mixture; reads are bounded."""

import errno
import os

import pytest

from graphmoe.errors import CheckpointError, CheckpointWriteError, ConfigError
from graphmoe.files import read_bytes, read_json, write_json


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "result.json")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_refused_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def refuse(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(CheckpointWriteError, match=r"result\.json: .*Input/output error; got 'EIO'"):
            write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "result.json"
    for obj in ({"long": "x" * 1000}, {"short": 1}):
        write_json(path, obj)
        assert read_json(path) == obj
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_reads_are_bounded_and_typed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_bytes(path, 8) == b"12345678"
    with pytest.raises(ConfigError, match="file: file is too large; expected at most 7 bytes"):
        read_bytes(path, 7, error=ConfigError)
    with pytest.raises(CheckpointError, match="no such file"):
        read_bytes(tmp_path, 7)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000, "9" * 5000, "\udcff"])
def test_files_that_hold_no_json_object(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"state\.json: malformed JSON"):
        read_json(path)
