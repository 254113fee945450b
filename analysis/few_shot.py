"""Few-shot memory: what one episode wrote and read, and accuracy beside what anybody reaches."""

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from analysis import style
from analysis.series import is_number
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

KIND = re.compile(r"accuracy_(\d+)w(\d+)s")
"""Name of the accuracy in episodes of so many ways and shots."""

EPISODE = {
    "support": "PXY",
    "query": "QXY",
    "support_labels": "P",
    "labels": "Q",
    "answers": "Q",
    "attention": "QP",
    "gate": "P",
}
"""Axes of the arrays ``final_episode_<name>``: P drawings learned from, Q drawings to tell, X x Y pixels."""

WRONG = "#cc3311"

_ROWS = {
    "metrics": ("", "standard_error", style.BLUE),
    "baseline": ("baseline", "baseline_error", style.ORANGE),
    "pixels": ("nearest pixels", None, style.TEAL),
    "chance": ("chance", None, style.QUIET),
}
"""Parts of a result: how they are called, where their standard errors stand, their colours."""


def has_episode(record: RunRecord) -> bool:
    """Whether a run recorded what one episode wrote and read."""
    return all(f"final_episode_{name}" in record.records for name in EPISODE)


def has_few_shot(record: RunRecord) -> bool:
    """Whether a run was scored in episodes."""
    return bool(_kinds(record))


@style.styled
def memory_episode(record: RunRecord) -> Figure:
    """Which slots each query of an episode read, on held-out characters: rows are queries, columns slots.

    Above each slot stands the drawing that was written into it, and how much of it; a query that is told
    wrongly has a red frame.
    """
    arrays = _episode(record)
    attention, labels = arrays["attention"], arrays["labels"]
    queries, slots = attention.shape
    right = arrays["answers"] == labels
    side = 9.0 / max(queries, slots)
    title = f"Memory of one episode: {int(right.sum())} of {queries} queries told right"
    fig = style.new_figure(side * slots + 2.4, side * queries + 2.3, title)
    grid = fig.add_gridspec(
        3, 3, width_ratios=(1, slots, 0.6), height_ratios=(2, 1, queries), wspace=0.02, hspace=0.02
    )
    ax = fig.add_subplot(grid[2, 1])
    image = ax.imshow(
        attention, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest"
    )
    fig.colorbar(image, cax=fig.add_subplot(grid[2, 2]), label="attention")
    _bare(ax)
    _borders(ax, arrays["support_labels"], labels)
    ax.set_xlabel("slot that was written (attention of a row sums to 1)")
    _drawings(fig.add_subplot(grid[1, 1]), arrays["support"], across=True)
    side_ax = fig.add_subplot(grid[2, 0])
    _drawings(side_ax, arrays["query"], across=False)
    side_ax.set_ylabel("query")
    height, width = arrays["query"].shape[1:]
    for row in np.flatnonzero(~right):
        corner = (-0.5, row * height - 0.5)
        frame = Rectangle(corner, width, height, fill=False, edgecolor=WRONG, linewidth=2, clip_on=False)
        side_ax.add_patch(frame)
    gate = fig.add_subplot(grid[0, 1], sharex=ax)
    gate.bar(np.arange(slots), arrays["gate"], color=style.ORANGE, width=0.7)
    gate.set_ylim(0, 1)
    gate.set_ylabel("written")
    gate.tick_params(labelbottom=False, bottom=False)
    gate.grid(False, axis="x")
    return fig


@style.styled
def few_shot_accuracy(record: RunRecord) -> Figure:
    """Accuracy by ways and shots on held-out characters, beside its baselines and chance.

    Thin lines are two standard errors over episodes.
    """
    kinds, result = _kinds(record), record.result or {}
    rows = [(part, *look) for part, look in _ROWS.items() if _accuracies(result, part, kinds).size]
    fig = style.new_figure(2.2 + 1.6 * len(kinds), 4.2, "Few-shot accuracy")
    ax = fig.subplots()
    width = 0.86 / max(1, len(rows))
    for place, (part, name, error, colour) in enumerate(rows):
        values = _accuracies(result, part, kinds)
        errors = _accuracies(result, error, kinds) if error else np.empty(0)
        at = np.arange(len(kinds)) + (place - (len(rows) - 1) / 2) * width
        given = result[part].get("name") if isinstance(result[part], dict) else None
        label = name or str(record.config.get("model", "model"))
        label = given if isinstance(given, str) else label
        bars = {"yerr": 2 * errors, "error_kw": {"elinewidth": 1, "ecolor": style.INK}} if errors.size else {}
        ax.bar(at, values, width=0.94 * width, color=colour, label=style.plain(label), **bars)
        for x, value in zip(at, values, strict=True):
            ax.annotate(
                f"{100 * value:.1f}", (x, value), xytext=(0, 4), textcoords="offset points", ha="center",
                fontsize=7,
            )  # fmt: skip
    ax.set_xticks(range(len(kinds)), [f"{ways}-way {shots}-shot" for ways, shots in kinds.values()])
    ax.grid(False, axis="x")
    ax.set_ylim(0, 1.08)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel("right answers")
    fig.legend(loc="outside lower center", ncols=max(1, len(rows)))
    return fig


def _kinds(record: RunRecord) -> dict[str, tuple[int, int]]:
    """Ways and shots of each kind of episode that was scored, by the name of its accuracy."""
    metrics = (record.result or {}).get("metrics")
    if not isinstance(metrics, dict):
        return {}
    found = {name: KIND.fullmatch(str(name)) for name, value in metrics.items() if is_number(value)}
    return {name: (int(match[1]), int(match[2])) for name, match in found.items() if match}


def _accuracies(result: dict, part: str, kinds: dict) -> np.ndarray:
    """Figures of one part of a result, ``[kinds]``; empty where one is missing."""
    values = result.get(part)
    found = [values.get(kind) for kind in kinds] if isinstance(values, dict) else [None]
    return np.array(found, dtype=float) if all(is_number(value) for value in found) else np.empty(0)


def _episode(record: RunRecord) -> dict[str, np.ndarray]:
    """The arrays of the episode, checked.

    Raises:
        CheckpointError: Arrays that do not fit one another.
    """
    arrays, sizes = {}, {}
    for name, axes in EPISODE.items():
        key = f"final_episode_{name}"
        array = arrays[name] = record.records[key]
        fits = array.ndim == len(axes) and array.size
        for axis, size in zip(axes, array.shape, strict=False):
            fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            expected = ", ".join(f"{axis} = {sizes.get(axis, 'any')}" for axis in axes)
            raise CheckpointError("array of another shape", f"{record.path}: {key}", expected, array.shape)
    return arrays


def _bare(ax: Axes) -> None:
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _borders(ax: Axes, across: np.ndarray, down: np.ndarray) -> None:
    """Lines between drawings of different characters."""
    look = {"color": style.QUIET, "linewidth": 0.6}
    for place in np.flatnonzero(np.diff(across)):
        ax.axvline(place + 0.5, **look)
    for place in np.flatnonzero(np.diff(down)):
        ax.axhline(place + 0.5, **look)


def _drawings(ax: Axes, images: np.ndarray, *, across: bool) -> None:
    """Draw images ``[n, height, width]`` side by side or below one another."""
    strip = np.concatenate(list(images), axis=1 if across else 0)
    ax.imshow(strip, cmap="Greys", aspect="auto", interpolation="nearest", vmin=0, vmax=255)
    _bare(ax)
