"""Expert connections: who listens to whom, with the strengths that the forward pass applies."""

import re
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis import style
from analysis.series import expert_names, live, series, settled, steps
from graphmoe.checkpoint import RunRecord


@style.styled
def expert_connections(record: RunRecord) -> Figure:
    """Strength with which each expert (row) listens to each other (column) at the end of the run."""
    coupling = _live_coupling(record)[-1]  # [L, E, E]
    low, high = style.value_range(_between(coupling))
    signed = low < 0
    norm = Normalize(-max(-low, high), max(-low, high)) if signed else Normalize(low, high)
    fig, axes, image = _matrices(
        record,
        coupling,
        f"Expert connections ({_kind(record)} coupling), step {steps(record)[-1]}",
        norm=norm,
        cmap="PuOr_r" if signed else "cividis",
    )
    _colorbar(fig, axes, image, "coupling strength")
    return fig


@style.styled
def expert_connections_change(record: RunRecord) -> Figure:
    """How far each connection has moved to the end of the run since the last ghost was fully there.

    Before that, connections also change because an expert more shares the same total.
    """
    coupling, start = _live_coupling(record), settled(record)
    layers = np.arange(coupling.shape[1])
    change = coupling[-1] - coupling[start, layers]
    # A change far below the strengths themselves must not look like a strong one.
    least = 0.02 * float(np.nanmax(np.abs(_between(coupling[-1])), initial=0))
    bound = max(float(np.nanmax(np.abs(_between(change)), initial=0)), least) or 1.0
    at = steps(record)
    fig, axes, image = _matrices(
        record,
        change,
        f"Change of expert connections ({_kind(record)}) to step {at[-1]}",
        norm=Normalize(-bound, bound),
        cmap="PuOr_r",
    )
    for ax, layer in zip(axes, style.shown_layers(len(layers)), strict=True):
        ax.set_title(f"layer {layer}, since step {at[start[layer]]}")
    _colorbar(fig, axes, image, "change of coupling strength")
    return fig


def _live_coupling(record: RunRecord) -> np.ndarray:
    """Coupling ``[S, L, E, E]``, NaN where there is no connection.

    That is wherever one side is dormant, and on the diagonal of couplings without self-connections.
    """
    coupling = series(record, "coupling")
    alive = live(record, coupling.shape[1])
    missing = ~(alive[..., :, None] & alive[..., None, :])
    self_connection = np.eye(coupling.shape[2], dtype=bool)
    if not coupling[..., self_connection].any():
        missing = missing | self_connection
    return np.where(missing, np.nan, coupling)


def _between(matrices: np.ndarray) -> np.ndarray:
    """The connections of different experts: ``matrices [*, E, E]`` with NaN on the diagonal."""
    return np.where(np.eye(matrices.shape[-1], dtype=bool), np.nan, matrices)


def _matrices(
    record: RunRecord, matrices: np.ndarray, title: str, *, norm: Normalize, cmap: str
) -> tuple[Figure, list[Axes], AxesImage]:
    """Draw ``matrices [L, E, E]`` as heatmaps, a panel a layer, with one colour scale.

    What an expert keeps of itself is much stronger than any connection and would leave no colours
    for those: on the diagonal there are numbers only.
    """
    kept = _connected(matrices)
    names, cells = np.array(expert_names(record)), matrices[:, kept][:, :, kept]
    shown, experts = style.shown_layers(len(cells)), len(kept)
    colours, signed = _between(cells), np.nanmin(_between(cells), initial=0) < 0
    places = 4 if experts <= 8 else 3
    # Square cells have to grow with the width of the numbers in them, in inches.
    cell = 0.3 + 0.04 * signed + 0.05 * (places == 4)
    side = float(np.clip(cell * experts, 2.0 if len(shown) > 1 else 3.0, 5.0))
    rows, columns = style.grid_shape(len(shown), side + 0.45)
    width, height = max((side + 0.45) * columns + 1.2, 6.2), (side + 0.75) * rows + 0.6
    fig = style.new_figure(width, height, title, layout="compressed")
    axes = style.panels(fig, len(shown), columns)
    form = _decimals(colours, most=places) if experts <= 12 else None
    for index, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        size = 8.0 if experts <= 5 else 6.5
        image = style.heatmap(
            ax, colours[layer], numbers=cells[layer], cmap=cmap, norm=norm, form=form, fontsize=size
        )
        ax.set_title(f"layer {layer}")
        style.name_ticks(ax, names[kept], axis="x")
        style.name_ticks(ax, names[kept], axis="y")
        if index % columns == 0:
            ax.set_ylabel("listening expert")
        if index + columns >= len(shown):
            ax.set_xlabel("speaking expert")
    note = _note(cells, np.delete(names, kept))
    if note:
        fig.supxlabel(note, fontsize=8, color=style.QUIET)
    return fig, axes, image


def _colorbar(fig: Figure, axes: list[Axes], image: AxesImage, label: str) -> None:
    """Add the colour scale that all panels share."""
    rows = axes[0].get_gridspec().nrows
    fig.colorbar(image, ax=axes, label=label, aspect=25 * rows, pad=0.02).outline.set_visible(False)


def _connected(matrices: np.ndarray) -> np.ndarray:
    """Return the experts with a connection in some layer; all of them if there is none at all."""
    known = np.isfinite(matrices)
    connected = known.any((0, 1)) | known.any((0, 2))
    return np.flatnonzero(connected if connected.any() else ~connected)


def _note(cells: np.ndarray, left_out: np.ndarray) -> str:
    """Say what an empty cell means, and which ghosts are not in the picture."""
    empty, diagonal = np.isnan(cells), np.eye(cells.shape[1], dtype=bool)
    reasons = ["an expert and itself"] if empty[:, diagonal].all() else []
    reasons += ["a ghost was dormant"] if empty[:, ~diagonal].any() else []
    parts = [f"– no connection: {' or '.join(reasons)}"] if reasons else []
    if left_out.size:
        named = ", ".join(left_out[:12]) + (" …" if left_out.size > 12 else "")
        parts.append(f"left out, without any connection: {named}")
    return "   ·   ".join(parts)


def _decimals(matrices: np.ndarray, *, most: int) -> Callable[[float], str]:
    """Return a formatter with as many decimals as tell the values apart, and no leading zeros."""
    spread = float(np.nanmax(matrices, initial=-np.inf) - np.nanmin(matrices, initial=np.inf))
    places = int(np.clip(1 - np.floor(np.log10(spread)), 0, most)) if 0 < spread < np.inf else 2
    return lambda value: re.sub(r"^(−?)0\.", r"\1.", f"{value:z.{places}f}".replace("-", "−"))


def _kind(record: RunRecord) -> str:
    return style.plain(record.meta.get("coupling", "unnamed"), 24)
