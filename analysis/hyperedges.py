"""Hyperedges: the learned weight of each set of experts that act together."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.series import array, expert_names, live, num_experts, series, steps
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

MAX_ROWS = 16
"""Hyperedges a panel shows; of more, the strongest half and the weakest half."""


@style.styled
def hyperedge_weights(record: RunRecord) -> Figure:
    """Learned weight of each hyperedge at the end of the run, named by its member experts."""
    weight, at = series(record, "hyperedge_weight")[[0, -1]], steps(record)  # [2, L, H]
    _, layers, hyperedges = weight.shape
    members, experts = hyperedge_members(record, hyperedges), num_experts(record)
    names, alive = expert_names(record), live(record, layers)[-1]
    shown = style.shown_layers(layers)
    edges = {layer: [edge for edge, ids in enumerate(members) if alive[layer, ids].all()] for layer in shown}
    rows, columns = style.grid_shape(len(shown), 3.0)
    height = (0.2 * min(max(map(len, edges.values())), MAX_ROWS + 1) + 0.75) * rows + 0.9
    title = f"Hyperedge weights, {strategy(record)}{experts} experts, step {at[-1]}"
    fig = style.new_figure(max(3.0 * columns + 0.5, 6.0), height, title)
    axes = style.panels(fig, len(shown), columns, sharex=True)
    for ax, layer in zip(axes, shown, strict=True):
        labels = [_edge_name([names[expert] for expert in members[edge]], experts) for edge in edges[layer]]
        first = weight[0, layer, edges[layer]] if len(at) > 1 else None
        _rows(ax, weight[1, layer, edges[layer]], first, labels)
        asleep = hyperedges - len(labels)
        ax.set_title(f"layer {layer}" + (f" · {asleep} of {hyperedges} dormant" if asleep else ""))
    low, high = style.value_range(weight[:, shown])
    axes[0].set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for ax in axes[-columns:]:
        ax.set_xlabel("hyperedge weight")
        ax.tick_params(labelbottom=True)
    ghosts = any(names[members[edge][-1]].startswith("g") for layer in shown for edge in edges[layer])
    handles = _legend(ghosts=ghosts, first=len(at) > 1)
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def hyperedge_members(record: RunRecord, num_hyperedges: int) -> list[list[int]]:
    """Return the member experts of each hyperedge, ascending, from the recorded incidence.

    Raises:
        CheckpointError: If the incidence is missing or names a hyperedge or expert that does not exist.
    """
    incidence, experts = array(record, "incidence", ndim=2), num_experts(record)
    if (
        len(incidence) != 2
        or incidence.min() < 0
        or (incidence.max(axis=1) >= (experts, num_hyperedges)).any()
    ):
        where = record.path / "records.safetensors"
        expected = f"[2, nnz] with {experts} experts and {num_hyperedges} hyperedges"
        got = f"{list(incidence.shape)} with ids from {incidence.min()} to {incidence.max(axis=1).tolist()}"
        raise CheckpointError("'incidence' does not fit the hyperedges", where, expected, got)
    members: list[list[int]] = [[] for _ in range(num_hyperedges)]
    for expert, edge in sorted(zip(*incidence.tolist(), strict=True)):
        members[edge].append(expert)
    return members


def _rows(ax: Axes, last: np.ndarray, first: np.ndarray | None, labels: list[str]) -> None:
    """Draw the weights of one layer as points, strongest on top, with lines from where they started.

    Points, not bars: weights differ by little, and the axis of a bar would have to begin at 0.
    """
    order, half = np.argsort(-last, kind="stable"), MAX_ROWS // 2
    names = [labels[place] for place in order]
    rows = np.arange(min(len(order), MAX_ROWS))
    if len(order) > MAX_ROWS:
        names = [*names[:half], f"… {len(order) - MAX_ROWS} …", *names[-half:]]
        order = np.r_[order[:half], order[-half:]]
        rows[half:] += 1
    colours = [style.ORANGE if "g" in labels[place] else style.BLUE for place in order]
    if first is not None:
        ax.hlines(rows, first[order], last[order], color=colours, linewidth=2, alpha=0.5)
        ax.plot(first[order], rows, "|", color=style.INK, markersize=8)
    ax.scatter(last[order], rows, c=colours, s=26, zorder=3)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 1) - 0.4, -0.6)


def _legend(*, ghosts: bool, first: bool) -> list[Line2D]:
    kinds = [("o", style.BLUE, "primary experts")]
    kinds += [("o", style.ORANGE, "with a ghost")] if ghosts else []
    kinds += [("|", style.INK, "at the first record")] if first else []
    return [Line2D([], [], linestyle="", marker=mark, color=ink, label=label) for mark, ink, label in kinds]


def _edge_name(members: list[str], num_experts: int) -> str:
    """``0·1·g0``; ``all 8`` for the whole set; the ends of a long list."""
    if len(members) == num_experts and num_experts > 3:
        return f"all {num_experts}"
    return "·".join(members) if len(members) <= 4 else f"{members[0]}…{members[-1]} ({len(members)})"


def strategy(record: RunRecord) -> str:
    """Return ``"all_pairs of "``, to begin a title with; empty where no strategy was recorded."""
    name = record.meta.get("hyperedge_strategy", "")
    return f"{style.plain(name, 24)} of " if name else ""
