"""Lines that have to be told apart: names at their ends, and a colour a layer."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style


def label_ends(ax: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Write names to the right of lines, at the heights of their ends, moved apart where they would meet.

    Args:
        ax: Where the lines are; its limits must be final.
        labels: Text, height of the end and colour of each line; one with a NaN height is left out.
    """
    low, high = ax.get_ylim()
    known = sorted((label for label in labels if np.isfinite(label[1])), key=lambda label: label[1])
    heights = apart(np.array([(value - low) / (high - low) for _, value, _ in known]), gap=0.085)
    for (text, _, colour), height in zip(known, heights, strict=True):
        look = {"textcoords": "offset points", "annotation_clip": False, "va": "center", "fontsize": 8}
        ax.annotate(text, (1, height), xycoords="axes fraction", xytext=(4, 0), color=colour, **look)


def apart(heights: np.ndarray, *, gap: float) -> np.ndarray:
    """Move ascending ``heights [M]`` until they are ``gap`` apart, inside 0 to 1 if there is room."""
    moved = heights.clip(0, 1)
    for _ in range(200):
        lacking = np.maximum(gap - np.diff(moved), 0) / 2
        if lacking.max(initial=0) < 1e-3:
            break
        moved = (moved + np.append(0, lacking) - np.append(lacking, 0)).clip(0, 1)
    return moved


def from_zero(ax: Axes, *values: np.ndarray | None) -> None:
    """Let the y axis begin at 0 and end somewhat above the largest of ``values``."""
    most = max((float(np.nanmax(part, initial=0)) for part in values if part is not None), default=0.0)
    ax.set_ylim(0, 1.1 * most if most > 0 else 1.0)


def layer_colours(num_layers: int) -> list[tuple[float, float, float, float]]:
    """Return one colour a layer, dark for the first ones and light for the last."""
    return [matplotlib.colormaps["viridis"](place) for place in np.linspace(0.0, 0.85, num_layers)]


def layer_lines(ax: Axes, steps: np.ndarray, values: np.ndarray, colours: Sequence[tuple]) -> None:
    """Draw ``values [S, L]`` over ``steps [S]``, a line a layer."""
    for layer, colour in enumerate(colours):
        style.line(ax, steps, values[:, layer], color=colour, linewidth=1.4)
    style.step_axis(ax, steps)


def layer_legend(fig: Figure, colours: Sequence[tuple], *others: Artist) -> None:
    """Put a legend of layers, some of them if there are many, and of ``others`` beside all panels."""
    named = sorted({int(layer) for layer in np.linspace(0, len(colours) - 1, min(len(colours), 12)).round()})
    lines = [Line2D([], [], color=colours[layer], label=f"layer {layer}") for layer in named]
    fig.legend(handles=[*lines, *others], loc="outside right upper")
