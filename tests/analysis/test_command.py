"""``python -m analysis``: a model and a text in place of a run, and readers that leave."""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_model import tiny_model
from tiny_transformers import tiny

from analysis.__main__ import main
from analysis.command import Parser, run_command
from graphmoe import viz
from graphmoe.data.tokenizer import byte_tokenizer
from graphmoe.viz import visualize


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny("olmoe", vocab_size=300).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_model_of_transformers_reads_a_text(folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([str(folder), "--text", "experts", "--plots", "routing_load", "routing_decisions"]) == 0
    trace = folder / "trace"
    written = [trace / "plots" / "routing_load.png", trace / "plots" / "routing_decisions.png"]
    written.append(trace / "report.html")
    assert [Path(line) for line in capsys.readouterr().out.splitlines()] == written
    assert all(path.stat().st_size > 5000 for path in written)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_several_texts_one_plot_and_another_folder(folder, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(viz, "visualize", lambda *a, **kw: seen.append(visualize(*a, **kw)) or seen[0])
    out = tmp_path / "out"
    arguments = ["--text", "one", "two", "--plots", "routing_load", "--out", str(out)]
    assert main([str(folder), *arguments]) == 0
    written = [out / "plots" / "routing_load.png", out / "report.html"]
    assert [Path(line) for line in capsys.readouterr().out.splitlines()] == written
    assert json.loads(seen[0].record.meta["tokens"]) == list("onetwo")
    assert seen[0].record.records["routed_sequence"].tolist() == [0, 0, 0, 1, 1, 1]
    assert not (folder / "trace").exists()


def test_pictures_of_a_text_are_no_part_of_a_checkpoint(tmp_path, capsys):
    step = tmp_path / "step-00000002"
    tiny_model(vocab_size=300, num_experts_per_tok=2).save_pretrained(step)
    byte_tokenizer().save_pretrained(step)
    before = sorted(step.iterdir())
    assert main([str(step), "--text", "text", "--plots", "routing_load"]) == 0
    assert sorted(step.iterdir()) == before
    assert (tmp_path / "trace" / "report.html").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model"], "--text: a model shows what it does with a text"),
        (["model", "--text"], "expected at least one argument"),
        (["model", "--text", ""], "text: no token in a text"),
        (["model", "--text", "a", "--plots", "routing_lead"], "did you mean 'routing_load'"),
        (["missing", "--text", "a"], "no checkpoint here"),
    ],
)
def test_what_is_wrong_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 100_000])  # kept back until the end, and not
def test_who_stops_reading_hears_nothing_more(lines, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        command = Parser("x", "y"), lambda _: print(*range(lines), sep="\n"), []
        assert run_command(*command) == 141
        pipe.flush()  # as Python does at its end
    assert not capsys.readouterr().err
