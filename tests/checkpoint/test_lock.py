"""The lock: one writer a run, and readers that leave it alone."""

import json
import os
import re
import signal
import time

import pytest

from graphmoe.checkpoint import RunLock, latest
from graphmoe.errors import CheckpointError


def hold_in_child(run):
    """Fork a process that holds the lock of a run until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunLock(run):
                os.write(writer, b"!")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


def test_one_writer_a_run(tmp_path, tree):
    child = hold_in_child(tmp_path)
    try:
        before = tree(tmp_path)
        host = re.escape(os.uname().nodename)
        with (
            pytest.raises(CheckpointError, match=f"in use by process {child} on host {host}"),
            RunLock(tmp_path),
        ):
            pytest.fail("two holders")
        assert tree(tmp_path) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="cannot be locked"), RunLock(tmp_path / "absent"):
        pytest.fail("no folder to lock")


def test_a_reader_leaves_a_running_writer_alone(tmp_path, save, tree):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    (bad / "state.json").unlink()
    (tmp_path / ".tmp-step-00000003-1").mkdir()
    child = hold_in_child(tmp_path)
    before = tree(tmp_path)
    try:
        with pytest.warns(UserWarning, match=r"state\.json"):
            assert latest(tmp_path) == good
        assert tree(tmp_path) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunLock(tmp_path), pytest.warns(UserWarning, match=r"state\.json"):
        assert latest(tmp_path) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "damaged-step-00000002", "step-00000001"]
