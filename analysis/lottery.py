"""Lottery tickets: accuracy against the weights that remain, and where those are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from analysis import style
from analysis.series import has, is_number
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

BRANCHES = {
    "ticket": ("ticket", style.BLUE, "o"),
    "reinit": ("same mask, other initial weights", style.ORANGE, "s"),
    "random": ("random mask, same initial weights", style.TEAL, "^"),
}
"""How the branches of a level are called, and how they are drawn."""

MOST_NUMBERS = 150
"""Cells of the picture of layers up to which each has its number."""


def has_lottery(record: RunRecord) -> bool:
    """Whether a run is a search for lottery tickets that is finished."""
    metrics = (record.result or {}).get("metrics")
    return isinstance(metrics, dict) and bool(metrics.get("curve"))


def has_ticket_pixels(record: RunRecord) -> bool:
    """Whether a search recorded which pixels its tickets hear, and is finished."""
    return has_lottery(record) and has(record, "final_ticket_pixels", "final_image_shape")


@style.styled
def lottery_curve(record: RunRecord) -> Figure:
    """Test accuracy against the weights that remain, beside the controls, the dense network and chance.

    Marks are means over seeds, bars two standard errors, dots single seeds.
    """
    rows = _levels(record)
    seeds = len(rows[0]["by_seed"]["dense"])
    fig = style.new_figure(10.4, 4.3, f"Lottery tickets, {seeds} seed{'s' * (seeds > 1)}")
    left, right = fig.subplots(1, 2)
    for ax in (left, right):
        for branch, look in BRANCHES.items():
            _branch(ax, [row for row in rows if branch in row["accuracy"]], branch, *look)
        _level_line(ax, rows[0]["accuracy"]["dense"], "dense", style.INK, "-")
        _share_axis(ax, [row["share"] for row in rows])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    for part, colour, dashes in (("baseline", style.QUIET, "--"), ("chance", style.QUIET, ":")):
        reference = (record.result or {}).get(part)
        if isinstance(reference, dict) and is_number(reference.get("test_accuracy")):
            name = style.plain(reference.get("name", part))
            _level_line(left, reference["test_accuracy"], name, colour, dashes)
    left.set_ylim(0, 1.02)
    left.set_ylabel("accuracy on test images")
    right.set_ylim(*_near(rows))
    right.set_title("the same, nearer")
    outside = sum(row["outside_mask"] for row in rows)
    left.set_title(f"audit: {outside:,} entries outside the masks are not 0")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


@style.styled
def ticket_layers(record: RunRecord) -> Figure:
    """Weights that remain in each layer at each level, in %: which layers pruning spares."""
    rows = _levels(record)
    names, sizes = list(rows[0]["layers"]), np.array(list(rows[0]["layers"].values()))
    counts = np.array([[row["layers"].get(name, np.nan) for name in names] for row in rows])
    share = 100 * (counts / sizes).T  # [layers, levels]
    fig = style.new_figure(2.9 + 0.75 * len(rows), 1.7 + 0.26 * len(names), "Weights that remain in a layer")
    ax = fig.subplots()
    form = (lambda value: f"{value:.3g}") if share.size <= MOST_NUMBERS else None
    norm = LogNorm(max(float(np.nanmin(share)), 1e-3), 100)
    image = style.heatmap(ax, share, cmap="cividis", norm=norm, form=form, aspect="auto")
    style.name_ticks(ax, [style.plain(name.removesuffix(".weight"), 40) for name in names], axis="y")
    style.name_ticks(ax, [f"{100 * row['share']:.3g}" for row in rows], axis="x")
    ax.set_xlabel("weights that remain in all layers together, %")
    bar = fig.colorbar(image, ax=ax, label="of the layer, %", format=FuncFormatter(style.amount))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    return fig


@style.styled
def ticket_pixels(record: RunRecord) -> Figure:
    """Neurons of the first layer that hear each pixel, a panel a level: what pruning finds unimportant."""
    heard, shape = record.records["final_ticket_pixels"], record.records["final_image_shape"]
    rows = _levels(record)
    fits = heard.ndim == 2 and shape.shape == (3,) and heard.dtype.kind == shape.dtype.kind == "i"
    if not fits or heard.shape != (len(rows), int(shape.prod())) or heard.min() < 0:
        where, expected = str(record.path / "records.safetensors"), f"counts [{len(rows)}, pixels]"
        raise CheckpointError("pixels cannot be drawn", where, expected, list(heard.shape))
    height, columns = style.grid_shape(len(rows), 2.6)
    fig = style.new_figure(
        2.6 * columns, 2.6 * height + 0.7, "Neurons that hear a pixel", layout="compressed"
    )
    for ax, row, degree in zip(style.panels(fig, len(rows), columns), rows, heard, strict=True):
        values = degree.reshape(shape.tolist()).sum(axis=0)  # colours of a pixel are three sources
        norm = Normalize(0, max(1, int(values.max())))
        image = style.heatmap(ax, values, cmap="cividis", norm=norm)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"{100 * row['share']:.3g} % of all weights\n{int((values == 0).sum())} pixels unheard")
        fig.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)
    return fig


def _branch(ax: Axes, rows: Sequence[dict], branch: str, name: str, colour: str, marker: str) -> None:
    if not rows:
        return
    share = [row["share"] for row in rows]
    errors = [2 * (row["standard_error"].get(branch) or 0) for row in rows]
    means = [row["accuracy"][branch] for row in rows]
    ax.errorbar(
        share, means, yerr=errors, label=name, color=colour, marker=marker, markersize=4, linewidth=1.5,
        elinewidth=1, capsize=2.5,
    )  # fmt: skip
    for row in rows:
        values = list(row["by_seed"][branch].values())
        if len(values) > 1:
            ax.scatter([row["share"]] * len(values), values, s=7, color=colour, alpha=0.45, linewidths=0)


def _level_line(ax: Axes, value: float, name: str, colour: str, dashes: str) -> None:
    label = f"{name}: {100 * value:.2f} %"
    ax.axhline(value, color=colour, linestyle=dashes, linewidth=1.1, label=label, zorder=1)


def _share_axis(ax: Axes, shares: Sequence[float]) -> None:
    """A logarithmic axis from all weights on the left to few on the right, with a tick a level."""
    ax.set_xscale("log")
    ax.set_xlim(1.15 * max(shares), min(shares) / 1.15)
    ax.xaxis.set_minor_locator(NullLocator())
    shown = shares[:: max(1, len(shares) // 8)]
    ax.set_xticks(shown, [f"{100 * share:.3g}" for share in shown])
    ax.set_xlabel("weights that remain, %")


def _near(rows: Sequence[dict]) -> tuple[float, float]:
    """Limits that show all branches."""
    values = [value for row in rows for seeds in row["by_seed"].values() for value in seeds.values()]
    slack = max(0.005, 0.06 * (max(values) - min(values)))
    return min(values) - slack, max(values) + slack


def _levels(record: RunRecord) -> list[dict]:
    """The curve of a search.

    Raises:
        CheckpointError: It is not one.
    """
    rows = (record.result or {}).get("metrics", {}).get("curve")
    fits = isinstance(rows, list) and all(isinstance(row, dict) and _is_level(row) for row in rows)
    if not fits or "dense" not in rows[0]["accuracy"] or min(rows[0]["layers"].values(), default=0) <= 0:
        where, expected = str(record.path / "result.json"), "levels with weights, accuracy and layers"
        raise CheckpointError("curve of a search cannot be drawn", where, expected)
    return rows


def _is_level(row: dict) -> bool:
    parts = [row.get(key) for key in ("accuracy", "standard_error", "by_seed", "layers")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    accuracy, errors, by_seed, layers = parts
    seeds = [by_seed.get(branch) for branch in accuracy]
    if not all(isinstance(values, dict) and values for values in seeds):
        return False
    numbers = [row.get("share"), row.get("outside_mask"), *accuracy.values(), *layers.values()]
    numbers += [value for values in seeds for value in values.values()]
    numbers += [value for value in errors.values() if value is not None]
    return all(is_number(value) for value in numbers) and 0 < row["share"] <= 1
