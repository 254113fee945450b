"""That pictures of small, large and diverged runs can be read: nothing clipped, nothing on top of a title."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_run import change, write_run

import analysis
from analysis.report import Report
from graphmoe.checkpoint import read

WITH_TEXT = ["hypergraph", "expert_load_over_time"]
WITH_LAYERS = ["specialisation", "routing_information", "orthogonality"]
TOGETHER = ["drop_rate", "expert_coactivation", "collaboration_attention", "mediator_gate", "inference_knobs"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options, names",
    [
        ({"layers": 1, "records": 1}, ["training_curves", "expert_load", "expert_connections", *WITH_TEXT]),
        ({"layers": 1, "records": 1}, ["hyperedge_weights", "ghost_timeline", *WITH_LAYERS]),
        ({"layers": 8, "primaries": 8, "ghosts": 4, "records": 9}, ["expert_load", "ghost_timeline"]),
        ({"layers": 4, "primaries": 8, "ghosts": 2, "records": 9}, ["expert_connections", *WITH_LAYERS]),
        ({"layers": 2, "primaries": 30, "ghosts": 0, "records": 2}, WITH_TEXT),
        ({"layers": 1, "primaries": 3, "ghosts": 0, "records": 1}, TOGETHER),
        ({"layers": 3, "primaries": 8, "ghosts": 1, "records": 9}, TOGETHER),
        ({"layers": 5, "primaries": 14, "ghosts": 0, "records": 9}, TOGETHER[1:3]),
    ],
)
def test_nothing_is_clipped_and_no_titles_overlap(tmp_path: Path, options: dict, names: list[str]):
    record = read(write_run(tmp_path / "run", **options))
    for name in names:
        figure = analysis.plots(record)[name](record)
        figure.draw_without_rendering()
        (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, name
        titles = [text for ax in figure.axes for text in [ax.title] if text.get_text()]
        titles += [text for text in figure.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in titles]
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[index + 1 :]), name


@pytest.mark.filterwarnings("error")
def test_names_of_connections_have_room_beside_the_panels(tmp_path: Path):
    record = read(write_run(tmp_path / "run", layers=5, primaries=8, ghosts=2, records=9))
    figure = analysis.plots(record)["expert_connections_over_time"](record)
    figure.draw_without_rendering()
    names = [text.get_window_extent() for ax in figure.axes for text in ax.texts]
    panels = [ax.get_window_extent() for ax in figure.axes]
    assert len(names) == 25 and len(panels) == 5
    for index, name in enumerate(names):
        assert not any(name.overlaps(panel) for panel in panels)
        assert not any(name.overlaps(other) for other in names[index + 1 :])
        assert name.x1 < figure.bbox.x1


@pytest.mark.filterwarnings("error")
def test_a_diverged_run_is_still_drawn(tmp_path: Path):
    run = write_run(tmp_path / "run", records=4)
    record = read(run)
    bad = {
        key: np.full_like(value, np.inf if key == "saturation" else np.nan)
        for key, value in record.records.items()
        if value.dtype.kind == "f" and key != "ghost_level"
    }
    lines = [json.dumps({"kind": "train", "step": step, "loss": float("nan"), "lr": 0.1}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = Report(read(change(run, **bad)))
    # All of a run; what a traced pass of a model is drawn as is not among them.
    assert list(report) == [plot.__name__ for plot, fits in analysis.PLOTS.items() if fits(record)]
    assert len(report) > 10
    for figure in report.values():
        figure.draw_without_rendering()
