"""What the picture of an ablation of slots and experts says."""

from pathlib import Path

import pytest
from fake_run import texts

from analysis.groups import Group
from analysis.memory_ablation import is_memory_ablation, memory_ablation
from graphmoe.checkpoint import RunRecord


def group(label: str, *figures: tuple[float, float]) -> Group:
    runs = []
    for seed, (recalled, kept) in enumerate(figures):
        result = {"metrics": {"recall_accuracy": recalled, "edges_kept": kept}, "seed": seed}
        result["chance"] = {"recall_accuracy": 0.05}
        runs.append(RunRecord(Path(f"{label}-{seed}"), {"seed": seed}, [], {}, {}, result))
    return Group(label, tuple(runs))


def test_bars_are_means_over_seeds_and_dots_are_seeds():
    figure = memory_ablation([group("full", (1.0, 0.9), (0.8, 0.7)), group("no_memory", (0.05, 0.6))])
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([0.9, 0.05])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.8, 0.6])
    assert [len(dots.get_offsets()) for dots in left.collections] == [2, 1]
    assert {"full", "no_memory", "chance", "90.0 %", "60.0 %"} <= set(texts(figure))
    assert list(left.lines[0].get_xdata()) == pytest.approx([0.05, 0.05])


def test_other_runs_are_none():
    other = Group("moe", (RunRecord(Path("moe"), {}, [], {}, {}, {"metrics": {"loss": 1.0}}),))
    assert not is_memory_ablation([other, other])
    assert not is_memory_ablation([group("full", (1.0, 0.9)), other])
    assert is_memory_ablation([group("full", (1.0, 0.9)), group("half", (1.0, 0.9))])
