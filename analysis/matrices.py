"""Figures of expert-by-expert matrices: heatmaps, a panel a layer, on one colour scale."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis import style


class Wording(NamedTuple):
    """What a figure of matrices says about them.

    Attributes:
        title: Title of the figure.
        rows: What the rows are.
        columns: What the columns are.
        scale: What the colours mean, with the unit.
        empty: What a cell without a number has not.
        reason: Why a cell off the diagonal may be without.
        note: What else is said below the panels.
    """

    title: str
    rows: str
    columns: str
    scale: str
    empty: str
    reason: str = "a ghost was dormant"
    note: str = ""


def draw_matrices(
    cells: np.ndarray,
    names: Sequence[str],
    wording: Wording,
    *,
    norm: Normalize,
    cmap: str,
    diagonal: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Draw matrices as heatmaps; experts that have no number in any layer are left out.

    Where what an expert has with itself is much stronger than anything between two, it would leave no
    colours for that: on the diagonal there are numbers only, unless it is asked for.

    Args:
        cells: ``[L, E, E]``, NaN where there is nothing.
        names: Names of the E experts.
        wording: The texts.
        norm: Scale from numbers to colours.
        cmap: Name of the colour map.
        diagonal: Colour the diagonal, too.

    Returns:
        The figure, whose last axes are the colour scale, and the axes of
        :func:`analysis.style.shown_layers`, titled ``layer 0`` ...
    """
    kept = present(cells)
    left_out = [name for expert, name in enumerate(names) if expert not in kept]
    cells, names = cells[:, kept][:, :, kept], [names[expert] for expert in kept]
    shown, experts = style.shown_layers(len(cells)), len(kept)
    colours = cells if diagonal else between(cells)
    signed = np.nanmin(colours, initial=0) < 0
    places = 4 if experts <= 8 else 3
    # Square cells have to grow with the width of the numbers in them, in inches.
    cell = 0.3 + 0.04 * signed + 0.05 * (places == 4)
    side = float(np.clip(cell * experts, 2.0 if len(shown) > 1 else 3.0, 5.0))
    rows, columns = style.grid_shape(len(shown), side + 0.45)
    note = explain_gaps(cells, left_out, wording)
    width, height = max((side + 0.45) * columns + 1.2, 6.2), (side + 0.75) * rows + (0.85 if note else 0.6)
    fig = style.new_figure(width, height, wording.title, layout="compressed")
    axes = style.panels(fig, len(shown), columns)
    form = decimals(colours, most=places) if experts <= 12 else None
    size = 8.0 if experts <= 5 else 6.5
    for index, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        image = style.heatmap(
            ax, colours[layer], numbers=cells[layer], cmap=cmap, norm=norm, form=form, fontsize=size
        )
        ax.set_title(f"layer {layer}")
        style.name_ticks(ax, names, axis="x")
        style.name_ticks(ax, names, axis="y")
        if index % columns == 0:
            ax.set_ylabel(wording.rows)
        if index + columns >= len(shown):
            ax.set_xlabel(wording.columns)
    colour_scale(fig, axes, image, wording.scale)
    if note:
        fig.supxlabel(note, fontsize=8, color=style.QUIET)
    return fig, axes


def between(matrices: np.ndarray) -> np.ndarray:
    """Return what different experts have with each other: ``matrices [*, E, E]``, NaN on the diagonal."""
    return np.where(np.eye(matrices.shape[-1], dtype=bool), np.nan, matrices)


def colour_scale(fig: Figure, axes: list[Axes], image: AxesImage, label: str) -> None:
    """Add the colour scale that all panels share."""
    rows = axes[0].get_gridspec().nrows
    fig.colorbar(image, ax=axes, label=label, aspect=25 * rows, pad=0.02).outline.set_visible(False)


def present(cells: np.ndarray) -> np.ndarray:
    """Return the experts with a number in some layer; all of them if there is none at all."""
    known = np.isfinite(cells)
    present = known.any((0, 1)) | known.any((0, 2))
    return np.flatnonzero(present if present.any() else ~present)


def explain_gaps(cells: np.ndarray, left_out: Sequence[str], wording: Wording) -> str:
    """Say what an empty cell of ``cells [L, E, E]`` means, and which ghosts are not in the picture."""
    missing = wording.empty
    empty, diagonal = np.isnan(cells), np.eye(cells.shape[1], dtype=bool)
    reasons = ["an expert and itself"] if empty[:, diagonal].all() else []
    reasons += [wording.reason] if empty[:, ~diagonal].any() else []
    parts = [f"– no {missing}: {' or '.join(reasons)}"] if reasons else []
    if left_out:
        named = ", ".join(left_out[:12]) + (" …" if len(left_out) > 12 else "")
        parts.append(f"left out, without any {missing}: {named}")
    return "   ·   ".join([*parts, *([wording.note] if wording.note else [])])


def decimals(matrices: np.ndarray, *, most: int) -> Callable[[float], str]:
    """Return a formatter with as many decimals as tell the values apart, and no leading zeros."""
    spread = float(np.nanmax(matrices, initial=-np.inf) - np.nanmin(matrices, initial=np.inf))
    places = int(np.clip(1 - np.floor(np.log10(spread)), 0, most)) if 0 < spread < np.inf else 2
    return lambda value: re.sub(r"^(−?)0\.", r"\1.", f"{value:z.{places}f}".replace("-", "−"))
