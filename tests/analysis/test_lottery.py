"""What the pictures of lottery tickets say, and what they refuse."""

import json

import numpy as np
import pytest
from fake_run import texts

import analysis
from analysis.lottery import lottery_curve, ticket_layers, ticket_pixels
from graphmoe.checkpoint import read, write_records
from graphmoe.errors import CheckpointError

NAMES = ("lottery_curve", "ticket_layers", "ticket_pixels")
SHARES, LAYERS = (1.0, 0.5, 0.1), {"body.weight": 80, "head.weight": 20}


def level(index, branches):
    seeds = {b: {"0": 0.9 - 0.1 * index, "1": 0.8 - 0.1 * index} for b in branches}
    layers = {name: count * SHARES[index] for name, count in LAYERS.items()}
    if index == 2:
        layers = {"body.weight": 2, "head.weight": 8}
    return {
        "level": index,
        "weights": round(100 * SHARES[index]),
        "total": 100,
        "share": SHARES[index],
        "accuracy": {b: float(np.mean(list(values.values()))) for b, values in seeds.items()},
        "standard_error": dict.fromkeys(branches, 0.05),
        "by_seed": seeds,
        "layers": layers,
        "outside_mask": 0,
    }


@pytest.fixture
def make(tmp_path):
    def write(*, change=None, pixels=None, result=True):
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        (path / "config.yaml").write_text("recipe: lottery_mlp\n")
        curve = [level(0, ["dense"]), level(1, ["ticket", "reinit"]), level(2, ["ticket", "reinit"])]
        parts = {
            "metrics": {"accuracy": 0.85, "curve": curve},
            "baseline": {"name": "logistic regression", "test_accuracy": 0.6, "accuracy": 0.6},
            "chance": {"name": "a uniform guess", "test_accuracy": 0.1, "accuracy": 0.1},
        }
        if change is not None:
            change(curve)
        if result:
            (path / "result.json").write_text(json.dumps(parts))
        heard = np.arange(18).reshape(3, 6) if pixels is None else pixels
        arrays = {"final_ticket_pixels": heard, "final_image_shape": np.array([1, 2, 3])}
        write_records(path / "records.safetensors", arrays, {"recipe": "lottery_mlp"})
        return read(path)

    return write


def test_a_finished_search_has_its_pictures(make):
    assert not set(NAMES) & set(analysis.plots(make(result=False)))
    assert list(analysis.plots(make())) == list(NAMES)
    other = make()._replace(records={})
    assert list(analysis.plots(other)) == list(NAMES[:2])


def test_the_curve_shows_means_errors_and_references(make):
    figure = lottery_curve(make())
    far, near = figure.axes
    assert far.get_xscale() == "log" and far.get_xlim()[0] > far.get_xlim()[1]
    assert [tick.get_text() for tick in far.get_xticklabels()] == ["100", "50", "10"]
    containers = {c.get_label(): c for c in far.containers}
    assert set(containers) == {"ticket", "same mask, other initial weights"}
    line, _, (bars,) = containers["ticket"].lines
    assert np.allclose(line.get_xdata(), [0.5, 0.1]) and np.allclose(line.get_ydata(), [0.75, 0.65])
    assert np.allclose([segment[:, 1] for segment in bars.get_segments()], [[0.65, 0.85], [0.55, 0.75]])
    names = {line.get_label() for line in far.lines}
    assert {"dense: 85.00 %", "logistic regression: 60.00 %", "a uniform guess: 10.00 %"} <= names
    assert near.get_ylim()[0] < 0.6 and near.get_ylim()[1] > 0.9 and near.get_ylim()[1] < 1
    assert "2 seeds" in figure.get_suptitle() and "audit: 0 entries" in far.get_title()


def test_layers_are_shares_of_themselves(make):
    figure = ticket_layers(make())
    values = figure.axes[0].images[0].get_array()
    assert np.allclose(values, [[100, 50, 2.5], [100, 50, 40]])
    assert {"body", "head", "2.5", "40"} <= set(texts(figure))


def test_pixels_are_those_of_each_level(make):
    figure = ticket_pixels(make())
    panels = [ax for ax in figure.axes if ax.images]
    assert [panel.images[0].get_array().tolist() for panel in panels] == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
        [[12, 13, 14], [15, 16, 17]],
    ]
    assert panels[0].get_title() == "100 % of all weights\n1 pixels unheard"


@pytest.mark.parametrize(
    "change",
    [
        lambda curve: curve.__setitem__(0, 3),
        lambda curve: curve[0].pop("accuracy"),
        lambda curve: curve[0]["accuracy"].pop("dense"),
        lambda curve: curve[1].update(share=0),
        lambda curve: curve[1].update(share="0.5"),
        lambda curve: curve[1]["accuracy"].update(ticket=None),
        lambda curve: curve[1]["by_seed"].update(ticket={}),
        lambda curve: curve[1]["by_seed"].pop("reinit"),
        lambda curve: curve[1]["standard_error"].update(ticket="x"),
        lambda curve: curve[0]["layers"].update({"head.weight": 0}),
    ],
)
def test_curves_that_are_none_are_an_error(make, change):
    record = make(change=change)
    for plot in (lottery_curve, ticket_layers):
        with pytest.raises(CheckpointError, match="curve of a search cannot be drawn"):
            plot(record)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 6), int), np.zeros((3, 5), int), np.zeros((3, 6)), np.full((3, 6), -1)]
)
def test_pixels_that_are_none_are_an_error(make, pixels):
    with pytest.raises(CheckpointError, match="pixels cannot be drawn"):
        ticket_pixels(make(pixels=pixels))


def test_the_headline_of_a_report_leaves_the_curve_to_its_picture(make, tmp_path):
    from analysis.report import Report

    page = Report(make(), "ticket_layers").to_html(tmp_path / "report.html").read_text()
    assert "0.85" in page and "by_seed" not in page
