"""What the pictures of memory slots say."""

from pathlib import Path

import numpy as np
import pytest
from fake_run import texts

import analysis
from analysis.memory import by_first_write
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError


def run(wrong: int = 1) -> RunRecord:
    """A run that copied three tokens through four slots, of which it never used slot 1."""
    write = np.zeros((7, 4), np.float32)
    write[[0, 1, 2], [2, 3, 0]] = 0.9
    read = np.zeros((7, 4), np.float32)
    read[[4, 5, 6], [2, 3, 0]] = 0.8
    answers = np.array([-100, -100, -100, -100, 5, 6, 7])
    answers[6 - np.arange(wrong)] = 1
    records = {
        "final_memory_write": write,
        "final_memory_read": read,
        "final_memory_tokens": np.array([5, 6, 7, 8, 9, 9, 9]),
        "final_memory_answers": answers,
        "final_memory_load": np.array([0.4, 0.0, 0.3, 0.3], np.float32),
        "final_copy_length": np.array([2, 3, 4]),
        "final_copy_accuracy": np.array([1.0, 0.9, 0.5], np.float32),
    }
    result = {
        "chance": {"recall_accuracy": 0.1},
        "baseline": {"name": "no memory $x", "recall_accuracy": 0.12},
    }
    return RunRecord(Path("run"), {}, [], records, {}, result)


def draw(record: RunRecord, name: str):
    return analysis.plots(record)[name](record)


def test_slots_stand_in_the_order_of_their_first_write():
    figure = draw(run(), "memory_map")
    shown = [ax.images[0].get_array() for ax in figure.axes[:2]]
    assert np.allclose(shown[0][:3, :3], 0.9 * np.eye(3))  # the diagonal of writing
    assert np.allclose(shown[1][:3, 4:], 0.8 * np.eye(3))  # and of reading
    assert by_first_write(np.array([[0, 1.0, 0], [0, 1, 0], [1, 0, 0]])).tolist() == [1, 0, 2]
    assert by_first_write(np.zeros((0, 2))).tolist() == [0, 1]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_answers_are_counted_and_marked(wrong: int):
    figure = draw(run(wrong), "memory_map")
    assert f"{3 - wrong} of 3 tokens recalled" in figure.get_suptitle()
    marks = [line for line in figure.axes[1].lines if line.get_color() == "#cc3311"]
    assert sorted(int(mark.get_xdata()[0]) for mark in marks) == [6, 5][:wrong][::-1]


def test_load_names_the_even_share_and_what_is_unused():
    figure = draw(run(), "slot_load")
    assert [round(bar.get_height()) for bar in figure.axes[0].patches] == [40, 0, 30, 30]
    assert "even 25.0 %; nearly unused: 1" in figure.axes[0].get_title()


def test_every_block_has_its_load():
    record = run()
    record.records["final_memory_load"] = np.array([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], np.float32)
    titles = [ax.get_title() for ax in draw(record, "slot_load").axes]
    assert titles == [
        "block 0: most 50.0 %, even 25.0 %; nearly unused: 2",
        "block 1: most 25.0 %, even 25.0 %; nearly unused: 0",
    ]


def test_a_text_asks_nothing():
    record = run()
    record.records["final_memory_answers"] = np.full(7, -100)
    figure = draw(record, "memory_map")
    assert figure.get_suptitle() == "Memory of one sequence: the first memory"
    assert not figure.axes[1].lines


def test_accuracy_stands_beside_the_baseline_and_chance():
    ax = draw(run(), "copy_accuracy").axes[0]
    heights = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert heights["model"] == pytest.approx([1.0, 0.9, 0.5])
    assert heights["chance"] == [0.1, 0.1]
    assert any("no memory" in text for text in texts(ax.figure))
    lonely = run()._replace(result=None)
    assert [line.get_label() for line in draw(lonely, "copy_accuracy").axes[0].lines] == ["model"]


def test_what_does_not_fit_is_named():
    broken = run()
    broken.records["final_memory_read"] = np.zeros((7, 3))
    with pytest.raises(CheckpointError, match="final_memory_read: not one value a step and slot"):
        draw(broken, "memory_map")
    broken.records["final_copy_accuracy"] = np.zeros(2)
    with pytest.raises(CheckpointError, match="final_copy_accuracy: not one accuracy a length"):
        draw(broken, "copy_accuracy")
    broken.records["final_memory_load"] = np.zeros((2, 2, 2))
    with pytest.raises(CheckpointError, match="final_memory_load: not one load a slot"):
        draw(broken, "slot_load")


def test_a_run_without_a_memory_has_no_such_pictures():
    nothing = RunRecord(Path("run"), {}, [], {}, {}, None)
    assert not {"memory_map", "slot_load", "copy_accuracy"} & set(analysis.plots(nothing))
