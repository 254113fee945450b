"""What the parts of a network of slots and experts are worth, beside the edges that it keeps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis import style
from analysis.comparison_figure import label_lines
from analysis.groups import Group

FIGURES = ("recall_accuracy", "edges_kept")


def is_memory_ablation(groups: Sequence[Group]) -> bool:
    """Return whether there is anything to draw: two groups or more of networks that recall."""
    return sum(group.spread("metrics", FIGURES[0]) is not None for group in groups) > 1


@style.styled
def memory_ablation(groups: Sequence[Group]) -> Figure:
    """Recall accuracy and the share of edges kept, a bar a group: mean over seeds, and a dot a seed."""
    shown = [group for group in groups if group.spread("metrics", FIGURES[0]) is not None]
    fig = style.new_figure(10.5, 0.42 * len(shown) + 1.6, "Slots and experts: one part at a time")
    axes = fig.subplots(1, 2, sharey=True)
    titles = ("tokens recalled", "edges kept of those that routers chose")
    for ax, key, title, colour in zip(axes, FIGURES, titles, (style.BLUE, style.TEAL), strict=True):
        _bars(ax, shown, key, colour)
        ax.set_title(title)
    chance = [value for group in shown for value in group.values("chance", FIGURES[0]).values()]
    if chance:
        axes[0].axvline(
            float(np.mean(chance)), color=style.QUIET, linestyle=":", linewidth=1.3, label="chance"
        )
        axes[0].legend(loc="lower left", bbox_to_anchor=(0.7, 0.98), frameon=False)
    axes[0].set_yticks(range(len(shown)), [label_lines(group.label) for group in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    return fig


def _bars(ax: Axes, groups: Sequence[Group], key: str, colour: str) -> None:
    for row, group in enumerate(groups):
        values = np.array(list(group.values("metrics", key).values()))
        if not len(values):
            continue
        ax.barh(row, values.mean(), height=0.62, color=colour, alpha=0.75)
        places = row + 0.12 * (np.arange(len(values)) - (len(values) - 1) / 2).clip(-2, 2)
        ax.scatter(values, places, s=14, color=style.INK, zorder=3, linewidths=0)
        ax.annotate(
            f"{100 * values.mean():.1f} %", (1, row), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    ax.set_xlim(0, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
