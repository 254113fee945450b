"""Metrics that go to a tracker: which, when, and what stops a run before it begins."""

import json

import pytest
import torch
from accelerate.tracking import GeneralTracker
from tiny_model import tiny_model

from graphmoe.errors import ConfigError
from graphmoe.train import ranks
from graphmoe.train.config import RunConfig
from graphmoe.train.loop import Every, fit
from graphmoe.train.ranks import make_accelerator
from graphmoe.train.tracking import TrackedLog, scalars, start_tracker


class Notebook(GeneralTracker):
    """Keeps what accelerate hands to a tracker."""

    name, requires_logging_directory = "notebook", False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.finished = None, {}, 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.lines.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


def config(**options):
    settings = {"max_steps": 4, "batch_size": 2, "warmup_steps": 0, "device": "cpu", "num_threads": 1}
    return RunConfig(**settings | options)


def batches(index, size, slots):
    ids = torch.full((size, 6), index % 31)[slots]
    return {"input_ids": ids, "labels": ids, "output_records": True}


def test_a_tracker_gets_the_numbers_of_the_file(tmp_path):
    settings, notebook = config(track="tensorboard", run_name="x"), Notebook()
    accelerator = make_accelerator(config())
    accelerator.log_with = [notebook]
    start_tracker(accelerator, settings)
    log = TrackedLog(tmp_path)
    fit(tiny_model(), batches, settings, tmp_path, callbacks=[Every(2, log)], accelerator=accelerator)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert notebook.lines == {row["step"]: scalars(row) for row in rows} and set(notebook.lines) == {2, 4}
    assert {"train/loss", "train/aux/balance", "train/lr", "train/tokens_per_second"} <= set(
        notebook.lines[4]
    )
    assert notebook.config["learning_rate"] == settings.learning_rate and notebook.config["resume"] is False
    assert notebook.config["data_dir"] == "None"  # what trackers take is numbers and text
    assert notebook.finished == 1


def test_numbers_of_a_line():
    line = {
        "kind": "eval",
        "step": 3,
        "loss": 1.5,
        "bits_per_byte": None,
        "aux": {"a": 2, "b": True},
        "dtype": "fp32",
    }
    assert scalars(line) == {"eval/loss": 1.5, "eval/aux/a": 2}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there_is_named_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ranks, "find_spec", lambda package: None)
    with pytest.raises(
        ConfigError, match=f"^--track: package is not installed; expected pip install .*{name}"
    ) as caught:
        make_accelerator(config(track=name, out_dir=str(tmp_path), run_name="x"))
    assert ("graphmoe[track]" in str(caught.value)) == (name == "tensorboard")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_start_is_an_error_of_the_flag():
    class Offline:
        def init_trackers(self, project, config, init_kwargs):
            raise OSError("no network")

    with pytest.raises(ConfigError, match=r"^--track: tracker does not start: no network; got 'wandb'"):
        start_tracker(Offline(), config(track="wandb"))
    start_tracker(Offline(), config())  # none is asked for


@pytest.mark.parametrize(
    "options, project, names",
    [
        ({"track": "tensorboard"}, "tensorboard", {}),
        ({"track": "tensorboard", "track_project": "p"}, "p", {}),
        ({"track": "wandb", "run_name": "r"}, "graphmoe", {"wandb": {"name": "r"}}),
        ({"track_project": "p", "run_name": "r"}, "p", {"wandb": {"name": "r"}}),
    ],
    ids=str,
)
def test_where_a_tracker_writes(options, project, names):
    calls = []

    class Accelerator:
        def init_trackers(self, project, config, init_kwargs):
            calls.append((project, init_kwargs))

    start_tracker(Accelerator(), config(**options))
    assert calls == [(project, names)]


def test_without_a_tracker_nothing_is_sent(tmp_path):
    log = TrackedLog(tmp_path)
    fit(tiny_model(), batches, config(), tmp_path, callbacks=[Every(2, log)])
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
