"""The directory of a run, and the exit status of its command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphmoe.errors import CheckpointError, ConfigError, DataError, GraphMoEError
from graphmoe.files import RunLock
from graphmoe.train.command import Stopped, exit_code, open_run, resolve_device
from graphmoe.train.config import RunConfig, to_yaml


def make_run(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes(to_yaml(RunConfig(), "toy"))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def contents(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="expected auto or cpu; got 'cuda'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda" and resolve_device("cpu") == "cpu"


def test_new_run(tmp_path):
    config = RunConfig(out_dir=str(tmp_path / "deep" / "runs"), run_name="a")
    run = open_run(config)
    assert run == tmp_path / "deep" / "runs" / "a" and run.is_dir()
    with RunLock(run):
        assert open_run(config) == run  # a lock alone is not a run
    with pytest.raises(ConfigError, match=r"^--run_name: a run needs a name"):
        open_run(RunConfig())
    (tmp_path / "b").touch()
    with pytest.raises(ConfigError, match="run directory cannot be used: Not a directory"):
        open_run(RunConfig(out_dir=str(tmp_path), run_name="b"))
    with pytest.raises(ConfigError, match="run directory cannot be used: Not a directory"):
        open_run(RunConfig(out_dir=str(tmp_path / "b"), run_name="c"))


def test_existing_run_is_left_alone(tmp_path):
    run = make_run(tmp_path / "a")
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_run(RunConfig(out_dir=str(tmp_path), run_name="a"))
    assert str(caught.value) == f"{run}: run exists; expected --resume, --overwrite or another --run_name"
    with pytest.raises(ConfigError, match="no run to resume"):
        open_run(RunConfig(out_dir=str(tmp_path), run_name="b", resume=True))
    assert open_run(RunConfig(out_dir=str(tmp_path), run_name="a", resume=True)) == run
    assert contents(tmp_path) == before


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    run = make_run(tmp_path / "a")
    (run / "step-00000001").mkdir()
    (run / "step-00000001" / "state.json").touch()
    (run / "link").symlink_to(outside)
    assert open_run(RunConfig(out_dir=str(tmp_path), run_name="a", overwrite=True)) == run
    assert [path.name for path in run.iterdir()] == [".lock"]
    with pytest.raises(ConfigError, match="this is no run and is not overwritten"):
        open_run(RunConfig(out_dir=str(tmp_path), run_name="outside", overwrite=True))
    (outside / "config.yaml").write_text("name: somebody else's\n")
    with pytest.raises(ConfigError, match="this is no run and is not overwritten"):
        open_run(RunConfig(out_dir=str(tmp_path), run_name="outside", overwrite=True))
    assert (outside / "file").read_text() == "precious"


def test_dry_run_only_checks(tmp_path):
    make_run(tmp_path / "a")
    before = contents(tmp_path)
    for name, overwrite in (("a", True), ("b", True), ("b", False)):
        config = RunConfig(out_dir=str(tmp_path), run_name=name, overwrite=overwrite)
        assert open_run(config, dry=True) == tmp_path / name
    with pytest.raises(ConfigError, match="run exists"):
        open_run(RunConfig(out_dir=str(tmp_path), run_name="a"), dry=True)
    assert contents(tmp_path) == before


def test_overwrite_of_a_run_in_use(tmp_path):
    run = make_run(tmp_path / "a")
    with RunLock(run):
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            open_run(RunConfig(out_dir=str(tmp_path), run_name="a", overwrite=True))
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "ending, code",
    [
        (None, 0),
        (KeyboardInterrupt(), 130),
        (Stopped(signal.SIGINT), 130),
        (Stopped(signal.SIGTERM), 143),
        (GraphMoEError("x"), 2),
        (DataError("too small", "corpus.txt", "a\nb"), 2),
    ],
)
def test_exit_codes(ending, code, capsys):
    def main(argv):
        assert argv == ["--seed", "1"]
        if ending:
            raise ending

    assert exit_code(main, ["--seed", "1"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == (code == 2) and err.startswith("error: " if code == 2 else "")


def test_bugs_keep_their_traceback():
    def main(argv):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        exit_code(main)


ROOT = Path(__file__).parents[2]
TALKS = """
import sys
from graphmoe.train.command import exit_code

def main(argv):
    print("first", flush=True)
    sys.stdin.read()
    print(*range({lines}), sep="\\n")

sys.exit(exit_code(main))
"""


@pytest.mark.parametrize("flags", [[], ["-u"]])
@pytest.mark.parametrize("lines", [1, 100_000])  # kept back until the end, and not
def test_who_stops_reading_hears_nothing_more(lines, flags, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, *flags, "-c", TALKS.format(lines=lines)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_a_bug():
    def main(argv):
        raise BrokenPipeError("of some worker")

    with pytest.raises(BrokenPipeError, match="of some worker"):
        exit_code(main)
