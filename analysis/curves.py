"""Training curves: losses, held-out quality, learning rate and speed over optimiser steps."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis import style
from analysis.series import expert_names, has, is_number, metric, num_ghosts, series
from analysis.series import steps as recorded_steps
from graphmoe.checkpoint import RunRecord

Points = tuple[np.ndarray, np.ndarray]
SINGLE = {
    "grad_norm": ("Gradient norm", "L2 norm before clipping"),
    **{f"{unit}_per_second": ("Speed", f"{unit} per second") for unit in ("tokens", "images", "bits")},
}


@style.styled
def training_curves(record: RunRecord) -> Figure:
    """Losses, held-out quality, learning rate and speed while the model was trained."""
    draws = _panels(record)
    rows, columns = style.grid_shape(len(draws), 4.0)
    fig = style.new_figure(3.9 * columns + 0.4, 2.7 * rows + 0.5, "Training curves")
    for ax, draw in zip(style.panels(fig, len(draws), columns), draws, strict=True):
        draw(ax)
    return fig


def has_curves(record: RunRecord) -> bool:
    """Whether ``metrics.jsonl`` holds anything that :func:`training_curves` can draw."""
    return bool(_panels(record))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving average of ``values [S]``; values that are not finite do not count.

    Centred, because an average that looks back lags behind a falling loss and would lie above the
    held-out loss that is drawn beside it. At the ends the window shrinks.

    Args:
        values: The raw series.
        window: Number of values an average is taken over.
    """
    known, kernel = np.isfinite(values), np.ones(min(max(window, 1), len(values)))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _panels(record: RunRecord) -> list[Callable[[Axes], None]]:
    """Return one drawing function a panel, only for what the run has recorded."""
    language = bool(
        len(metric(record, "train", "lm_loss")[0]) or len(metric(record, "eval", "perplexity")[0])
    )
    draws: list[Callable[[Axes], None]] = []
    train, held_out = _train_loss(record), metric(record, "eval", "loss")
    if len(train[0]) or len(held_out[0]):
        unit = "cross-entropy, nats per token" if language else "loss"
        draws.append(partial(_loss, train=train, held_out=held_out, unit=unit))
    bits, perplexity = metric(record, "eval", "bits_per_byte"), metric(record, "eval", "perplexity")
    accuracy = metric(record, "eval", "accuracy")
    if len(accuracy[0]):
        draws.append(partial(_accuracy, points=accuracy, result=record.result or {}))
    if len(bits[0]):
        draws.append(partial(_bits_per_byte, points=bits, baseline=_baseline(record, "bits_per_byte")))
    if len(perplexity[0]):
        draws.append(partial(_perplexity, points=perplexity))
    auxiliary = {name: metric(record, "train", f"aux/{name}") for name in _auxiliary_names(record)}
    auxiliary = {name: points for name, points in auxiliary.items() if len(points[0])}
    if auxiliary:
        draws.append(partial(_auxiliary, curves=auxiliary))
    rate = metric(record, "train", "lr")
    if len(rate[0]):
        draws.append(partial(_learning_rate, primary=rate, record=record))
    for key, (title, unit) in SINGLE.items():
        points = metric(record, "train", key)
        if len(points[0]):
            draws.append(
                partial(_single, points=points, title=title, unit=unit, from_zero=key != "grad_norm")
            )
    return draws


def _loss(ax: Axes, *, train: Points, held_out: Points, unit: str) -> None:
    steps, values = train
    if len(steps):
        window = len(steps) // 20
        raw = {"alpha": 0.35, "linewidth": 0.8} if window > 1 else {}
        style.line(ax, steps, values, color=style.BLUE, label="train", **raw)
        if window > 1:
            label = f"train, mean of {window} points"
            ax.plot(steps, smooth(values, window), color=style.BLUE, linewidth=1.8, label=label)
    if len(held_out[0]):
        style.line(ax, *held_out, color=style.ORANGE, marker="o", label="held out")
    _finish(ax, "Loss", unit, np.concatenate([steps, held_out[0]]))
    ax.legend()


def _bits_per_byte(ax: Axes, *, points: Points, baseline: tuple[str, float] | None) -> None:
    last = points[1][-1]
    style.line(ax, *points, color=style.ORANGE, marker="o", label=f"held out, last {last:.3f}")
    if baseline is not None:
        name, value = baseline
        label = f"{style.plain(name, 24)} baseline {value:.3f}"
        ax.axhline(value, color=style.QUIET, linestyle="--", linewidth=1.2, label=label)
    _finish(ax, "Held-out compression", "bits per byte", points[0])
    ax.legend()


def _accuracy(ax: Axes, *, points: Points, result: dict) -> None:
    """Accuracy on the validation part; the references are of the test part."""
    style.line(ax, *points, color=style.ORANGE, marker="o", label=f"validation, last {points[1][-1]:.3f}")
    for key, dashes in (("baseline", "--"), ("majority", "-."), ("chance", ":")):
        part = result.get(key)
        if isinstance(part, dict) and is_number(part.get("accuracy")):
            name, value = style.plain(str(part.get("name", key)), 32), float(part["accuracy"])
            look = {"color": style.QUIET, "linestyle": dashes, "linewidth": 1.2}
            ax.axhline(value, label=f"{name} {value:.3f}", **look)
    _finish(ax, "Accuracy", "share of right answers", points[0])
    ax.legend(fontsize=7)


def _perplexity(ax: Axes, *, points: Points) -> None:
    style.line(ax, *points, color=style.ORANGE, marker="o", label=f"held out, last {points[1][-1]:.4g}")
    _finish(ax, "Held-out perplexity", "perplexity per token", points[0])
    if style.spans_decades(points[1]):
        style.log_axis(ax)
    ax.legend()


def _auxiliary(ax: Axes, *, curves: dict[str, Points]) -> None:
    for index, (name, (steps, values)) in enumerate(curves.items()):
        colour = style.PRIMARIES[index % len(style.PRIMARIES)]
        style.line(ax, steps, values, color=colour, linewidth=1.3, label=style.plain(name, 24))
    _finish(ax, "Auxiliary losses", "loss", np.concatenate([points[0] for points in curves.values()]))
    if style.spans_decades(np.concatenate([points[1] for points in curves.values()])):
        style.log_axis(ax)
    _legend_above(ax, columns=2)


def _learning_rate(ax: Axes, *, primary: Points, record: RunRecord) -> None:
    """Draw the rate of the primary experts and the applied rate of each ghost, a mean over layers."""
    style.line(ax, *primary, color=style.TEAL, linewidth=1.3, label="primary")
    at = primary[0]
    if has(record, "ghost_learning_rate"):
        rates, names = series(record, "ghost_learning_rate").mean(axis=1), expert_names(record)
        steps = recorded_steps(record)
        at = np.concatenate([at, steps])
        for ghost, name in enumerate(names[-num_ghosts(record) :]):
            look = {"color": style.GHOSTS[ghost % len(style.GHOSTS)], "linestyle": "--", "linewidth": 1.3}
            style.line(ax, steps, rates[:, ghost], label=name, **look)
    _finish(ax, "Learning rate", "learning rate", at)
    if ax.get_ylim()[0] < 0:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(style.amount))
    if len(ax.lines) > 1:
        ax.set_title("Learning rate (ghosts: mean over layers)")
        _legend_above(ax, columns=4)


def _single(ax: Axes, *, points: Points, title: str, unit: str, from_zero: bool) -> None:
    steps, values = points
    style.line(ax, steps, values, color=style.TEAL, linewidth=1.3)
    _finish(ax, title, unit, steps)
    if from_zero and values.min() >= 0:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(style.amount))


def _legend_above(ax: Axes, columns: int) -> None:
    """Put the legend of ``ax`` over its lines, and make room for it there."""
    rows = math.ceil(len(ax.get_legend_handles_labels()[0]) / columns)
    scale, room = ax.yaxis.get_transform(), 0.02 + 0.09 * rows
    low, high = scale.transform(np.array(ax.get_ylim()))
    ax.set_ylim(top=scale.inverted().transform(low + (high - low) / (1 - room)))
    ax.legend(loc="upper center", ncols=columns)


def _finish(ax: Axes, title: str, unit: str, steps: np.ndarray) -> None:
    ax.set_title(title)
    ax.set_ylabel(unit)
    style.step_axis(ax, steps)


def _train_loss(record: RunRecord) -> Points:
    """The part of the training loss that the held-out loss is comparable with."""
    points = metric(record, "train", "lm_loss")
    return points if len(points[0]) else metric(record, "train", "loss")


def _auxiliary_names(record: RunRecord) -> list[str]:
    names: dict[str, None] = {}
    for entry in record.metrics:
        if isinstance(entry.get("aux"), dict):
            names |= dict.fromkeys(entry["aux"])
    return list(names)


def _baseline(record: RunRecord, key: str) -> tuple[str, float] | None:
    """The baseline's name and its value of metric ``key``, if the run's result holds one."""
    baseline = (record.result or {}).get("baseline")
    if not isinstance(baseline, dict) or not is_number(baseline.get(key)):
        return None
    return str(baseline.get("name", "unigram")), float(baseline[key])
