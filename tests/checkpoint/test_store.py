"""Checkpoints are whole or absent, durable, and found again."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from graphmoe import checkpoint
from graphmoe.checkpoint import tensors
from graphmoe.errors import CheckpointError, CheckpointWriteError, ConfigError


def test_layout_modes_and_manifest(tmp_path, save):
    old = os.umask(0o027)
    try:
        extras = [lambda folder: (folder / "tokenizer.json").write_text("{}"), lambda f: (f / "sub").mkdir()]
        step_dir = save(tmp_path / "runs" / "a", 20, extras=[*extras, lambda f: (f / "sub/x").touch()])
    finally:
        os.umask(old)
    assert step_dir.name == "step-00000020"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "sub/x"}
    files = {p.relative_to(step_dir).as_posix(): p for p in step_dir.rglob("*") if p.is_file()}
    assert set(files) == names | {"manifest.json"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o640}
    manifest = json.loads(files["manifest.json"].read_text())
    assert manifest["files"] == {n: hashlib.sha256(files[n].read_bytes()).hexdigest() for n in names}
    assert manifest["step"] == 20 and manifest["threads"] == torch.get_num_threads()
    assert {"python", "torch", "graphmoe", "cpu", "transformers"} <= set(manifest["versions"])


def test_only_the_newest_are_kept(tmp_path, save):
    for step in (5, 10, 200, 1000):
        save(tmp_path, step, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000200", "step-00001000"]
    save(tmp_path, 7, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    with pytest.raises(ConfigError, match="keep"):
        save(tmp_path, 8, keep=0)


def test_old_step_that_cannot_be_deleted_is_only_a_warning(tmp_path, monkeypatch, save):
    save(tmp_path, 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **kw: real(p, **kw) if kw else refuse(p))
    with pytest.warns(UserWarning, match="step-00000001 could not be deleted: Permission denied"):
        step_dir = save(tmp_path, 2, keep=1)
    checkpoint.verify(step_dir)


def test_saving_a_step_again_replaces_it(tmp_path, save):
    save(tmp_path, 1, state={"try": 1})
    step_dir = save(tmp_path, 1, state={"try": 2})
    checkpoint.verify(step_dir)
    assert checkpoint.read_json(step_dir / "state.json") == {"try": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_order_of_flushes_and_rename(tmp_path, monkeypatch, save, tree):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", str(b))), replace(a, b)))
    step_dir = save(tmp_path, 1, extras=[lambda folder: (folder / "sub").mkdir()])
    draft = tmp_path / f".tmp-{step_dir.name}-{os.getpid()}"
    files = [("fsync", str(draft / name)) for name in tree(step_dir) if name != "sub"]
    tail = [("fsync", str(draft / "sub")), ("fsync", str(draft))]
    tail += [("rename", str(step_dir)), ("fsync", str(tmp_path))]
    assert sorted(calls[: len(files)]) == sorted(files)
    assert calls[len(files) :] == tail


def fail_at(monkeypatch, owner, name, number):
    """Let the call of this number (and no other) raise; return the list of calls."""
    real, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


CALLS = [
    (os, "fsync"),
    (os, "replace"),
    (os, "chmod"),
    (Path, "mkdir"),
    (Path, "write_bytes"),
    (tensors, "save_file"),
]


@pytest.mark.parametrize("step", [3, 2], ids=["new step", "existing step"])
@pytest.mark.parametrize("owner, name", CALLS, ids=[name for _, name in CALLS])
def test_any_refused_call_leaves_the_run_as_it_was(tmp_path, monkeypatch, save, tree, owner, name, step):
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = tree(tmp_path)
    for number in range(1, 30):
        error = None
        with monkeypatch.context() as patch:
            calls = fail_at(patch, owner, name, number)
            try:
                save(tmp_path, step, state={"new": True}, keep=3)
            except CheckpointWriteError as caught:
                error = caught
        if len(calls) < number:
            break
        assert error.got == "ENOSPC" and error.__cause__.errno == errno.ENOSPC
        assert error.where == str(tmp_path / f"step-{step:08d}")
        assert tree(tmp_path) == before
    assert number > 1 and error is None
    assert checkpoint.read_json(checkpoint.latest(tmp_path) / "state.json") == {"new": True}


def test_full_disk_seen_by_safetensors(tmp_path, save, tree):
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp_path, 1)
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="File too large; got 'EFBIG'"):
            checkpoint.save(tmp_path, 2, model=model, optimizer=optimizer, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == before


def test_failing_extra_leaves_no_draft(tmp_path, save):
    def stop(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, extras=[stop])
    assert list(tmp_path.iterdir()) == []


def save_forever(run, step, pipe, trained):
    """Save until killed and report each finished save; every second one replaces an existing step."""
    try:
        while True:
            step += 1
            checkpoint.save(run, step - step % 2, state={"count": step}, **trained)
            os.write(pipe, step.to_bytes(4, "big"))
    finally:
        os._exit(1)


def test_sigkill_at_any_moment_keeps_every_finished_checkpoint(tmp_path, trained):
    torch.manual_seed(0)
    delays = (torch.rand(15) * 0.03).tolist()
    step, drafts = 0, 0
    for delay in delays:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(tmp_path, step, writer, trained)
        os.close(writer)
        acknowledged = int.from_bytes(os.read(reader, 4), "big")
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            rest = pipe.read()
        if rest:
            acknowledged = int.from_bytes(rest[-4:], "big")
        drafts += any(path.name.startswith(".") for path in tmp_path.iterdir())
        step_dir = checkpoint.latest(tmp_path)
        step = checkpoint.read_json(step_dir / "state.json")["count"]
        assert acknowledged <= step <= acknowledged + 1
        assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
    assert drafts >= 5  # otherwise the kills did not hit saves


def test_latest_without_and_with_only_damaged_steps(tmp_path, save):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match=r"state\.json"),
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
        checkpoint.latest(tmp_path)
    with pytest.raises(CheckpointError, match="every checkpoint of the run is damaged"):
        checkpoint.latest(tmp_path)  # they have been set aside, and a new start would hide them
    (save(tmp_path, 2) / "state.json").write_text("{}")
    good = save(tmp_path, 1)
    with pytest.warns(UserWarning, match=r"state\.json"):
        assert checkpoint.latest(tmp_path) == good
    aside = ["damaged-step-00000001", "damaged-step-00000002", "damaged-step-00000002-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*aside, "step-00000001"]


def test_latest_tidies_up(tmp_path, save):
    step_dir = save(tmp_path, 1)
    shutil.copytree(step_dir, tmp_path / ".tmp-step-00000002-77")
    (tmp_path / ".tmp-result.json-77").write_text("{")
    step_dir.rename(tmp_path / ".old-step-00000001")  # killed between the two renames of a replacement
    assert checkpoint.latest(tmp_path) == step_dir
    shutil.copytree(step_dir, tmp_path / ".old-step-00000001")
    assert checkpoint.latest(tmp_path) == step_dir
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
