"""Ghost experts: the saturation that wakes them, and how each one goes from dormant to active."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from analysis import style
from analysis.series import (
    ACTIVATING,
    ACTIVE,
    DORMANT,
    expert_names,
    num_ghosts,
    number,
    phases,
    series,
    steps,
)
from graphmoe.checkpoint import RunRecord

PHASE_NAMES = {DORMANT: "dormant", ACTIVATING: "activating", ACTIVE: "active"}
PHASE_COLOURS = {DORMANT: style.EMPTY, ACTIVATING: "#f9c97c", ACTIVE: "#8fd3c1"}


@style.styled
def ghost_timeline(record: RunRecord) -> Figure:
    """Saturation against the threshold that wakes a ghost, and the phase and level of each ghost."""
    at, level, phase = steps(record), series(record, "ghost_level"), phases(record)
    saturation = series(record, "saturation") if "saturation" in record.records else None
    threshold, ghosts = number(record, "ghost_activation_threshold"), num_ghosts(record)
    seen = np.append([] if saturation is None else saturation, [] if threshold is None else threshold)
    logarithmic = style.spans_decades(seen)
    shown = style.shown_layers(level.shape[1])
    rows, columns = style.grid_shape(len(shown), 3.4)
    lanes = min(0.42 * ghosts + 0.3, 6.0)
    curve = 1.5 if saturation is not None else 0.0
    awake = int((phase[-1] != DORMANT).sum())
    title = f"Ghost experts: {awake} of {phase[-1].size} awake at step {at[-1]}"
    fig = style.new_figure(max(3.4 * columns + 0.3, 6.0), (lanes + curve + 0.7) * rows + 0.8, title)
    names = expert_names(record)[-ghosts:]
    ratios = [curve, lanes] if curve else [lanes]
    for part, layer in zip(fig.subfigures(rows, columns, squeeze=False).flat, shown, strict=False):
        axes = part.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        if saturation is not None:
            woken = _wakings(at, phase[:, layer])
            _saturation(axes[0], at, saturation[:, layer], threshold, woken, logarithmic=logarithmic)
        _lanes(axes[-1], at, level[:, layer], phase[:, layer], names)
        axes[0].set_title(f"layer {layer}")
        style.step_axis(axes[-1], at)
    handles, _ = axes[0].get_legend_handles_labels()
    handles += [Patch(color=PHASE_COLOURS[phase], label=name) for phase, name in PHASE_NAMES.items()]
    handles.append(Line2D([], [], color=style.INK, linewidth=1.3, label="level, 0 to 1 in its lane"))
    fig.legend(handles=handles, loc="outside lower center", ncols=6 if columns > 1 else 3)
    return fig


def transitions(at: np.ndarray, phase: np.ndarray) -> list[tuple[int, int, int]]:
    """Return each change of phase as ``(step, ghost, new phase)``, in order of steps.

    The step is the first recorded one in the new phase. A ghost that is not dormant in the first
    record counts as having changed there.

    Args:
        at: Recorded steps, ``[S]``.
        phase: Phase of each ghost of one layer, ``[S, G]``.
    """
    before = np.vstack([np.full_like(phase[:1], DORMANT), phase[:-1]])
    return [(int(at[row]), int(ghost), int(phase[row, ghost])) for row, ghost in np.argwhere(phase != before)]


def _wakings(at: np.ndarray, phase: np.ndarray) -> list[int]:
    """Steps at which some ghost of a layer was first seen awake; ``phase [S, G]``."""
    awake = phase != DORMANT
    return at[1:][(awake[1:] & ~awake[:-1]).any(axis=1)].tolist()


def _saturation(
    ax: Axes,
    at: np.ndarray,
    saturation: np.ndarray,
    threshold: float | None,
    woken: list[int],
    *,
    logarithmic: bool,
) -> None:
    """Draw the saturation of one layer, the threshold, and a line wherever a ghost woke."""
    style.line(ax, at, saturation, color=style.BLUE, label="saturation")
    if threshold is not None:
        label = f"threshold {threshold:g}"
        ax.axhline(threshold, color=style.ORANGE, linestyle="--", linewidth=1.2, label=label)
    for step in woken:
        ax.axvline(step, color=style.QUIET, linestyle=":", linewidth=1)
    if logarithmic:
        style.log_axis(ax)
    else:
        ax.set_ylim(bottom=min(0, np.nanmin(saturation, initial=0)))
    ax.set_ylabel("saturation")


def _lanes(ax: Axes, at: np.ndarray, level: np.ndarray, phase: np.ndarray, names: list[str]) -> None:
    """Draw one lane a ghost: background = phase, line = level, numbers = steps of transitions."""
    changes, start, span = transitions(at, phase), at[0], max(at[-1] - at[0], 1)
    if len(at) == 1:
        at, level, phase = at + np.array([-1, 1]), level.repeat(2, axis=0), phase.repeat(2, axis=0)
    for ghost in range(len(names)):
        top, floor = ghost + 0.06, ghost + 0.94
        for value, colour in PHASE_COLOURS.items():
            rows = np.flatnonzero(phase[:-1, ghost] == value)
            spans = np.column_stack([at[rows], at[rows + 1] - at[rows]])
            ax.broken_barh(spans, (top, floor - top), facecolors=colour, linewidth=0)
        height = floor - (floor - top) * np.clip(level[:, ghost], 0, 1)
        ax.plot(at, height, color=style.INK, linewidth=1.3)
    for step, ghost, value in changes:
        ax.vlines(step, ghost + 0.06, ghost + 0.94, color=style.INK, linewidth=1)
        # A waking step is written before its line and an active one behind it, where the level is
        # flat, unless the edge of the panel is too near; on two heights, so that they never meet.
        wakes, place = value == ACTIVATING, (step - start) / span
        left = place > 0.2 if wakes else place > 0.8
        text = ax.annotate(
            str(step),
            (step, ghost + (0.32 if wakes else 0.68)),
            xytext=(-3 if left else 3, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=7,
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.set_ylim(len(names), 0)
    ax.set_ylabel("ghost")
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
