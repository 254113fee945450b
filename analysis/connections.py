"""Expert connections: who listens to whom, with the strengths that the forward pass applies."""

from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.lines import label_ends
from analysis.matrices import Wording, between, draw_matrices
from analysis.series import expert_names, live, num_ghosts, series, settled, steps
from graphmoe.checkpoint import RunRecord

HIGHLIGHTED, HIGHLIGHTED_GHOSTS = 3, 2
"""Pairs of primary experts, and pairs with a ghost, that are named in each layer: the strongest."""
# The look of a pair without (False) and with a ghost (True).
_FAINT = {False: "#b6bcc6", True: "#f0b890"}
_DASHES = {False: "-", True: (0, (4, 1.5))}


@style.styled
def expert_connections(record: RunRecord) -> Figure:
    """Strength with which each expert (row) listens to each other (column) at the end of the run."""
    coupling = _live_coupling(record)[-1]  # [L, E, E]
    low, high = style.value_range(between(coupling))
    signed = low < 0
    norm = Normalize(-max(-low, high), max(-low, high)) if signed else Normalize(low, high)
    wording = _wording(
        f"Expert connections ({_kind(record)} coupling), step {steps(record)[-1]}", "coupling strength"
    )
    cmap = "PuOr_r" if signed else "cividis"
    return draw_matrices(coupling, expert_names(record), wording, norm=norm, cmap=cmap)[0]


@style.styled
def expert_connections_change(record: RunRecord) -> Figure:
    """How far each connection has moved to the end of the run since the last ghost was fully there.

    Before that, connections also change because an expert more shares the same total.
    """
    coupling, start = _live_coupling(record), settled(record)
    layers = np.arange(coupling.shape[1])
    change = coupling[-1] - coupling[start, layers]
    # A change far below the strengths themselves must not look like a strong one.
    least = 0.02 * float(np.nanmax(np.abs(between(coupling[-1])), initial=0))
    bound = max(float(np.nanmax(np.abs(between(change)), initial=0)), least) or 1.0
    at = steps(record)
    title = f"Change of expert connections ({_kind(record)}) to step {at[-1]}"
    fig, axes = draw_matrices(
        change,
        expert_names(record),
        _wording(title, "change of coupling strength"),
        norm=Normalize(-bound, bound),
        cmap="PuOr_r",
    )
    for ax, layer in zip(axes, style.shown_layers(len(layers)), strict=True):
        ax.set_title(f"layer {layer}, since step {at[start[layer]]}")
    return fig


@style.styled
def expert_connections_over_time(record: RunRecord) -> Figure:
    """Strength of the connection of every pair of experts while the model was trained, a panel a layer.

    The strength of a pair is the mean of its two directions.
    """
    coupling, at, names = _live_coupling(record), steps(record), expert_names(record)
    strength = (coupling + coupling.swapaxes(2, 3)) / 2  # [S, L, E, E]
    primaries = len(names) - num_ghosts(record)
    pairs = list(combinations(range(len(names)), 2))
    pairs = [pair for pair in pairs if np.isfinite(strength[:, :, *pair]).any()]
    shown = style.shown_layers(coupling.shape[1])
    rows, columns = style.grid_shape(len(shown), 3.9)
    title = f"Expert connections ({_kind(record)} coupling) over time"
    fig = style.new_figure(max(3.9 * columns + 0.2, 6.0), 2.6 * rows + 0.9, title)
    axes = style.panels(fig, len(shown), columns, sharey=True)
    low, high = style.value_range(between(strength[:, shown]))
    axes[0].set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    for index, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        lines = {pair: strength[:, layer, *pair] for pair in pairs}
        _pairs(ax, at, lines, names, primaries)
        ax.set_title(f"layer {layer}")
        style.step_axis(ax, at, label=index + columns >= len(shown))
        if index % columns == 0:
            ax.set_ylabel("coupling strength")
    ghosts = sum(second >= primaries for _, second in pairs)
    others = len(pairs) - ghosts > HIGHLIGHTED
    fig.legend(handles=_legend(others=others, ghosts=ghosts > 0), loc="outside lower center", ncols=4)
    return fig


def strongest(last: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """Return the pairs with the ``count`` largest absolute strengths, strongest first; never a NaN.

    Args:
        last: Strength of each pair of expert ids.
        count: How many to return, at most.
    """
    known = [pair for pair, value in last.items() if np.isfinite(value)]
    return sorted(known, key=lambda pair: (-abs(last[pair]), pair))[:count]


def _pairs(
    ax: Axes, at: np.ndarray, lines: dict[tuple[int, int], np.ndarray], names: list[str], primaries: int
) -> None:
    """Draw the pairs of one layer: a few by name and colour, all others as thin lines behind them."""
    with_ghost = {pair: pair[1] >= primaries for pair in lines}
    named = []
    for ghost, count in ((False, HIGHLIGHTED), (True, HIGHLIGHTED_GHOSTS)):
        last = {pair: line[-1] for pair, line in lines.items() if with_ghost[pair] == ghost}
        colours = style.GHOSTS if ghost else style.PRIMARIES
        named += list(zip(strongest(last, count), colours, strict=False))
    for pair, line in lines.items():
        look = {"color": _FAINT[with_ghost[pair]], "linestyle": _DASHES[with_ghost[pair]]}
        if pair not in dict(named):
            style.line(ax, at, line, linewidth=0.8, markersize=2, **look)
    for pair, colour in named:
        style.line(ax, at, lines[pair], color=colour, linestyle=_DASHES[with_ghost[pair]], linewidth=1.8)
    labels = [("·".join(names[expert] for expert in pair), lines[pair][-1], colour) for pair, colour in named]
    label_ends(ax, labels)


def _legend(*, others: bool, ghosts: bool) -> list[Line2D]:
    handles = [Line2D([], [], color=style.INK, linewidth=1.8, label="named: the strongest at the end")]
    if others:
        handles.append(Line2D([], [], color=_FAINT[False], linewidth=1.2, label="other pairs"))
    if ghosts:
        look = {"color": _FAINT[True], "linestyle": _DASHES[True], "linewidth": 1.2}
        handles.append(Line2D([], [], label="other pairs with a ghost (dashed)", **look))
    return handles


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


def _wording(title: str, scale: str) -> Wording:
    return Wording(title, "listening expert", "speaking expert", scale, "connection")


def _kind(record: RunRecord) -> str:
    return style.plain(record.meta.get("coupling", "unnamed"), 24)
