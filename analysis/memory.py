"""Memory slots: who wrote and read them in one sequence, how they are loaded, and what is recalled."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis import style
from analysis.series import has, is_number
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

MAP = ("final_memory_write", "final_memory_read", "final_memory_tokens", "final_memory_answers")
COPY = ("final_copy_length", "final_copy_accuracy")
NO_ANSWER = -100
WRONG = "#cc3311"


def has_memory(record: RunRecord) -> bool:
    """Whether a run recorded what one sequence wrote and read."""
    return has(record, *MAP)


def has_slot_load(record: RunRecord) -> bool:
    """Whether a run recorded how its slots are loaded."""
    return has(record, "final_memory_load")


def has_copies(record: RunRecord) -> bool:
    """Whether a run was scored by the length of sequences."""
    return has(record, *COPY)


@style.styled
def memory_map(record: RunRecord) -> Figure:
    """What each token of one sequence wrote into and read from each slot of the first memory; where tokens
    were asked to recall, a red tick is a wrong answer.

    Slots stand in the order in which tokens first wrote them, so that a memory that gives every place a slot
    of its own shows two diagonals: written before the delimiter (dotted), read behind it.
    """
    write, read, answers, wanted = _map(record)
    asked = answers != NO_ANSWER
    order = by_first_write(write[~asked])
    wrong = np.flatnonzero(asked & (answers != wanted))
    right = int(asked.sum()) - len(wrong)
    steps, slots = write.shape
    what = f"{right} of {int(asked.sum())} tokens recalled" if asked.any() else "the first memory"
    title = f"Memory of one sequence: {what}"
    fig = style.new_figure(10.5, float(np.clip(0.09 * slots, 2.2, 4.5)) * 2 + 1.1, title)
    axes = fig.subplots(2, 1, sharex=True)
    parts = ((write, "written: routing weight times gate"), (read, "read: attention, mean over heads"))
    for ax, (values, name) in zip(axes, parts, strict=True):
        # The colours end above 0.01: what is smaller is hardly there.
        norm = PowerNorm(0.5, 0, max(float(values.max(initial=0)), 0.01))
        image = style.heatmap(ax, values[:, order].T, cmap="cividis", norm=norm, aspect="auto")
        ax.set_title(name)
        ax.set_ylabel("slot, by first write")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if asked.any():
            ax.axvline(int(asked.argmax()) - 1, color="white", linestyle=":", linewidth=1.2)
        fig.colorbar(image, ax=ax, pad=0.01)
    for step in wrong:
        axes[1].plot([step, step], [slots - 0.5, 1.03 * slots - 0.5], color=WRONG, clip_on=False)
    axes[1].set(xlim=(-0.5, steps - 0.5), ylim=(slots - 0.5, -0.5))
    axes[1].set_xlabel("step of the sequence")
    return fig


@style.styled
def slot_load(record: RunRecord) -> Figure:
    """Share of the edges of held-out sequences that each slot of each memory has, beside an even share
    (dotted)."""
    shares = record.records["final_memory_load"].astype(float)
    if shares.ndim not in (1, 2) or not shares.size:
        raise CheckpointError("not one load a slot", "final_memory_load", "[S] or [L, S]", shares.shape)
    shares = np.atleast_2d(shares)
    fig = style.new_figure(8.0, 1.7 * len(shares) + 1.5, "Load of the memory slots")
    axes = fig.subplots(len(shares), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for layer, (ax, share) in enumerate(zip(axes, shares, strict=True)):
        even = 1 / len(share)
        ax.bar(np.arange(len(share)), 100 * share, color=style.BLUE, width=0.85)
        ax.axhline(100 * even, color=style.INK, linestyle=":", linewidth=1.2)
        unused = int((share < 0.1 * even).sum())
        text = f"most {100 * share.max():.1f} %, even {100 * even:.1f} %; nearly unused: {unused}"
        ax.set_title(text if len(shares) == 1 else f"block {layer}: {text}")
        ax.set_ylabel("edges, %")
        ax.grid(False, axis="x")
        ax.set_xlim(-0.7, len(share) - 0.3)
    axes[-1].set_xlabel("slot")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return fig


@style.styled
def copy_accuracy(record: RunRecord) -> Figure:
    """Recall accuracy of held-out sequences by their length, beside a network without memory and chance."""
    length, accuracy = (record.records[name] for name in COPY)
    if length.ndim != 1 or length.shape != accuracy.shape:
        raise CheckpointError("not one accuracy a length", COPY[1], list(length.shape), accuracy.shape)
    fig = style.new_figure(6.6, 3.4, "Recall by length of the sequence")
    ax = fig.subplots()
    style.line(ax, length, accuracy, color=style.BLUE, label="model", marker="o", markersize=3)
    result = record.result or {}
    baseline = result.get("baseline") or {}
    _level(ax, baseline.get("recall_accuracy"), str(baseline.get("name", "baseline")), style.ORANGE, "--")
    _level(ax, (result.get("chance") or {}).get("recall_accuracy"), "chance", style.QUIET, ":")
    ax.set_ylim(0, 1.04)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlabel("tokens to recall")
    ax.set_ylabel("tokens recalled")
    ax.legend(loc="center right")
    return fig


def by_first_write(write: np.ndarray) -> np.ndarray:
    """Slots in the order in which tokens ``[steps, S]`` first chose them most of all; the others behind."""
    first = list(dict.fromkeys(write.argmax(axis=1).tolist())) if len(write) else []
    return np.array(first + [slot for slot in range(write.shape[1]) if slot not in first], dtype=np.int64)


def _level(ax: Axes, value: object, name: str, colour: str, dashes: str) -> None:
    if is_number(value):
        ax.axhline(value, color=colour, linestyle=dashes, linewidth=1.3, label=style.plain(name))


def _map(record: RunRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What was written and read ``[T, S]``, what was answered and what would be right, ``[T]``."""
    write, read, tokens, answers = (record.records[name] for name in MAP)
    if write.ndim != 2 or read.shape != write.shape or not write.shape[1]:
        raise CheckpointError("not one value a step and slot", MAP[1], list(write.shape), read.shape)
    if tokens.shape != write.shape[:1] or answers.shape != tokens.shape:
        raise CheckpointError("not one token a step", MAP[3], list(write.shape[:1]), answers.shape)
    asked = np.flatnonzero(answers != NO_ANSWER)
    wanted = np.full_like(tokens, NO_ANSWER)
    wanted[asked] = tokens[: len(asked)]
    return write, read, answers, wanted
