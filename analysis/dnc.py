"""What a differentiable neural computer did with one sequence: usage, writes, reads, links."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.series import has
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

_SHAPES = {
    "input": ("step", "in"),
    "asked": ("step",),
    "output": ("step", "out"),
    "usage": ("step", "slot"),
    "write": ("step", "slot"),
    "read": ("step", "head", "slot"),
    "allocates": ("step",),
    "link": ("slot", "slot"),
    "wrong": (None,),
}


def has_dnc(record: RunRecord) -> bool:
    """Whether the sequence of a computer is recorded."""
    return has(record, *(f"final_dnc_{name}" for name in _SHAPES))


@style.styled
def dnc_memory(record: RunRecord) -> Figure:
    """One sequence: what went in and came out, and where the memory was written and read.

    Slots are in the order in which they were written most. What is asked for lies right of the dashed line.
    """
    arrays = _arrays(record)
    written, asked = arrays["write"], np.flatnonzero(arrays["asked"])
    order = np.lexsort((written.argmax(axis=0), -(written.max(axis=0) > 0.1).astype(int)))
    wrong, answers = (int(value) for value in arrays["wrong"])
    fig = style.new_figure(7.6, 9.4, f"Memory of a DNC · {wrong} of {answers} answers wrong")
    heads = arrays["read"].shape[1]
    rows = [
        ("input", arrays["input"].T, "Greys"),
        ("output", np.where(arrays["asked"] > 0, arrays["output"].T, np.nan), "Greys"),
        ("usage", arrays["usage"].T[order], "Blues"),
        ("write weights", written.T[order], "Oranges"),
        *((_head(r, heads), arrays["read"][:, r].T[order], "Greens") for r in range(heads)),
    ]
    heights = [max(1.0, min(len(cells), 16) / 8) for _, cells, _ in rows]
    axes = fig.subplots(len(rows) + 1, 1, sharex=True, height_ratios=[*heights, 1.0])
    for ax, (name, cells, cmap) in zip(axes, rows, strict=False):
        _cells(ax, cells, cmap)
        ax.set_ylabel(name)
    gate = axes[-1]
    gate.plot(arrays["allocates"], color=style.BLUE, drawstyle="steps-mid", linewidth=1.4)
    gate.set_ylim(-0.05, 1.05)
    gate.set_ylabel("writes to a\nfree slot")
    gate.set_xlabel("step")
    if len(asked):
        for ax in axes:
            ax.axvline(asked[0] - 0.5, color=style.INK, linestyle="--", linewidth=0.9)
    return fig


@style.styled
def dnc_links(record: RunRecord) -> Figure:
    """Which slot was written right after which, at the end of one sequence; slots in the order of writing.

    A memory that keeps the order has its links right below the diagonal.
    """
    arrays = _arrays(record)
    written = arrays["write"]
    used = np.flatnonzero(written.max(axis=0) > 0.1)
    order = used[np.argsort(written[:, used].argmax(axis=0), kind="stable")]
    cells = arrays["link"][np.ix_(order, order)] if len(order) else arrays["link"]
    fig = style.new_figure(5.0, 4.4, "Links between slots")
    ax = fig.subplots()
    image = _cells(ax, cells, "Oranges", aspect="equal")
    fig.colorbar(image, ax=ax, label="link").outline.set_visible(False)
    ax.set_ylabel("written later")
    ax.set_xlabel("written right before")
    return fig


def _head(head: int, heads: int) -> str:
    return "read weights" if heads == 1 else f"read weights,\nhead {head}"


def _cells(ax: Axes, cells: np.ndarray, cmap: str, aspect: str = "auto"):
    """Draw values from 0 to 1, the first row on top."""
    image = ax.imshow(cells, cmap=cmap, vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def _arrays(record: RunRecord) -> dict[str, np.ndarray]:
    """The arrays by name.

    Raises:
        CheckpointError: Sizes that do not fit one another.
    """
    arrays, sizes = {}, {}
    for name, axes in _SHAPES.items():
        array = arrays[name] = record.records[f"final_dnc_{name}"]
        fits = array.ndim == len(axes) and array.size
        for axis, size in zip(axes, array.shape, strict=False):
            fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            expected = ", ".join(f"{axis} = {sizes.get(axis, 'any')}" for axis in axes)
            where = f"{record.path}: final_dnc_{name}"
            raise CheckpointError("array of another shape", where, expected, array.shape)
    return arrays
