import json

import numpy as np
import pytest

import analysis
from analysis.few_shot import few_shot_accuracy, memory_episode
from graphmoe.checkpoint import read, write_records
from graphmoe.errors import CheckpointError

KINDS = ("accuracy_5w1s", "accuracy_20w1s")
WAYS = 3


def write_run(path, *, changes=None, result=True):
    path.mkdir()
    (path / "config.yaml").write_text("recipe: few_shot\nmodel: memory\n")
    labels = np.arange(WAYS).repeat(2)
    arrays = {
        "support": np.random.default_rng(0).integers(0, 255, (6, 5, 4), dtype=np.uint8),
        "query": np.zeros((6, 5, 4), dtype=np.uint8),
        "support_labels": labels,
        "labels": labels,
        "answers": np.where(np.arange(6) == 4, 0, labels),
        "attention": np.full((6, 6), 1 / 6, dtype=np.float32),
        "gate": np.linspace(0.4, 0.9, 6, dtype=np.float32),
    } | (changes or {})
    arrays = {f"final_episode_{name}": array for name, array in arrays.items() if array is not None}
    write_records(path / "records.safetensors", arrays, {"recipe": "few_shot"})
    if result:
        parts = {
            "metrics": dict.fromkeys(KINDS, 0.9),
            "standard_error": dict.fromkeys(KINDS, 0.01),
            "baseline": {"name": "prototypical network"} | dict.fromkeys(KINDS, 0.8),
            "pixels": {"name": "nearest pixels"} | dict.fromkeys(KINDS, 0.5),
            "chance": {"accuracy_5w1s": 0.2, "accuracy_20w1s": 0.05},
        }
        (path / "result.json").write_text(json.dumps(parts))
    return read(path)


def test_a_run_has_both_plots(tmp_path):
    assert list(analysis.plots(write_run(tmp_path / "run"))) == ["memory_episode", "few_shot_accuracy"]
    unfinished = write_run(tmp_path / "unfinished", result=False)
    assert list(analysis.plots(unfinished)) == ["memory_episode"]
    other = write_run(tmp_path / "other", changes={"gate": None})
    assert list(analysis.plots(other)) == ["few_shot_accuracy"]


def test_the_picture_of_an_episode_shows_its_numbers(tmp_path):
    record = write_run(tmp_path / "run")
    figure = memory_episode(record)
    matrix, support, query, gates = (figure.axes[place] for place in (0, 2, 3, 4))
    assert np.allclose(matrix.images[0].get_array(), record.records["final_episode_attention"])
    assert support.images[0].get_array().shape == (5, 24) and query.images[0].get_array().shape == (30, 4)
    assert np.allclose([bar.get_height() for bar in gates.patches], record.records["final_episode_gate"])
    assert len(query.patches) == 1 and query.patches[0].get_y() == 4 * 5 - 0.5  # the query told wrongly
    assert "5 of 6 queries" in figure.get_suptitle()


def test_bars_are_the_figures_of_the_result(tmp_path):
    figure = few_shot_accuracy(write_run(tmp_path / "run"))
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers if len(group) == 2]
    assert [h for h in heights if h] == [[0.9, 0.9], [0.8, 0.8], [0.5, 0.5], [0.2, 0.05]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["memory", "prototypical network", "nearest pixels", "chance"]
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["5-way 1-shot", "20-way 1-shot"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": np.zeros((6, 5), dtype=np.float32)},
        {"answers": np.zeros((6, 1), dtype=np.int64)},
        {"query": np.zeros((6, 5), dtype=np.uint8)},
        {"gate": np.zeros(0, dtype=np.float32)},
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"final_episode_\w+: array of another shape"):
        memory_episode(write_run(tmp_path / "run", changes=changes))
