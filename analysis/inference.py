"""The knobs of inference: held-out loss with other numbers of rounds and steps than in training."""

from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis import style
from analysis.series import final, has
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

ROUNDS, STEPS = "rounds of collaboration, R", "steps of reasoning, S"


class Knobs(NamedTuple):
    """What was tried.

    Attributes:
        loss: Held-out loss, ``[P, Q]``, nats per token.
        error: Standard error of its difference to the loss with the numbers of training, ``[P, Q]``.
        steps: Steps of reasoning, ``[P]``; a single 0: the experts do not reason in steps.
        rounds: Rounds of collaboration, ``[Q]``; a single 0: the experts do not collaborate.
        trained: Place of the numbers of training in ``loss``.
    """

    loss: np.ndarray
    error: np.ndarray
    steps: np.ndarray
    rounds: np.ndarray
    trained: tuple[int, int]


@style.styled
def inference_knobs(record: RunRecord) -> Figure:
    """Held-out loss of one model with more or fewer rounds of collaboration and steps of reasoning.

    Right its difference to the loss with the numbers of training, ± its standard error over windows.
    """
    knobs = read_knobs(record)
    height = max(3.6, 0.62 * len(knobs.steps) + 2.0)
    wide = 0.95 * max(len(knobs.rounds), 3) + 1.2
    fig = style.new_figure(5.4 + wide, height, "Rounds and steps at inference (held-out text)")
    curves, table = fig.subplots(1, 2, width_ratios=(4.6, wide))
    _curves(curves, knobs)
    _differences(table, knobs)
    return fig


def read_knobs(record: RunRecord) -> Knobs:
    """Return what the run has measured.

    Raises:
        CheckpointError: The numbers of training are not among those that were tried.
    """
    loss, steps, rounds = (final(record, f"inference_{name}") for name in ("loss", "steps", "rounds"))
    error = np.full_like(loss, np.nan)
    if has(record, "final_inference_error"):
        error = final(record, "inference_error")
    trained = final(record, "inference_trained").tolist()
    places = [np.flatnonzero(tried == value) for tried, value in zip((steps, rounds), trained, strict=True)]
    if not all(len(place) == 1 for place in places):
        raise CheckpointError(
            "'final_inference_trained' cannot be drawn",
            str(record.path / "records.safetensors"),
            f"one of the steps {steps.tolist()} and of the rounds {rounds.tolist()}",
            trained,
        )
    return Knobs(loss, error, steps, rounds, (int(places[0][0]), int(places[1][0])))


def _curves(ax: Axes, knobs: Knobs) -> None:
    """Draw the loss over rounds, a line a number of steps; over steps where there are no rounds."""
    over_rounds = len(knobs.rounds) > 1 or len(knobs.steps) == 1
    at, lines = (knobs.rounds, knobs.loss) if over_rounds else (knobs.steps, knobs.loss.T)
    several = over_rounds and len(knobs.steps) > 1
    places = np.linspace(0, 0.85, len(lines))
    colours = [matplotlib.colormaps["viridis"](place) for place in places] if several else [style.BLUE]
    for index, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        label = f"S = {knobs.steps[index]}" if several else None
        style.line(ax, at, line, color=colour, marker="o", label=label)
    place = (knobs.rounds if over_rounds else knobs.steps)[knobs.trained[int(over_rounds)]]
    ring = {"s": 110, "facecolors": "none", "edgecolors": style.ORANGE, "linewidths": 2.0, "zorder": 4}
    ax.scatter(place, knobs.loss[knobs.trained], label="as trained", **ring)
    ax.set_xticks(at, [str(value) for value in at])
    ax.set_xlim(at.min() - 0.3, at.max() + 0.3)
    ax.set_xlabel(ROUNDS if over_rounds else STEPS)
    ax.set_ylabel("held-out loss, nats per token")
    ax.margins(y=0.12)
    ax.legend()
    setting = [f"R = {knobs.rounds[knobs.trained[1]]}"] if len(knobs.rounds) > 1 else []
    setting += [f"S = {knobs.steps[knobs.trained[0]]}"] if len(knobs.steps) > 1 else []
    ax.set_title(f"Loss (trained with {', '.join(setting)}: {knobs.loss[knobs.trained]:.4f})")


def _differences(ax: Axes, knobs: Knobs) -> None:
    """Write the difference to the loss as trained into a cell a setting."""
    change = knobs.loss - knobs.loss[knobs.trained]
    bound = float(np.nanmax(np.abs(change), initial=0)) or 1.0
    norm = Normalize(-bound, bound)
    style.heatmap(ax, change, cmap="PuOr_r", norm=norm, aspect="auto", form=lambda _: "")
    for text, (row, column) in zip(ax.texts, np.ndindex(change.shape), strict=True):
        text.set_text(_cell(change[row, column], knobs.error[row, column], (row, column) == knobs.trained))
        text.set_fontsize(8)
    ax.set_xticks(range(len(knobs.rounds)), [str(value) for value in knobs.rounds])
    ax.set_yticks(range(len(knobs.steps)), [str(value) for value in knobs.steps])
    ax.set_xlabel(ROUNDS)
    ax.set_ylabel(STEPS)
    ax.set_title("Difference to the loss as trained, ± standard error")


def _cell(change: float, error: float, trained: bool) -> str:
    """``+0.0123`` over ``± 0.0004``; below 0 is better."""
    if trained:
        return "as trained"
    if not np.isfinite(change):
        return "–"
    text = f"{change:+.4f}".replace("-", "−")
    return f"{text}\n± {error:.4f}" if np.isfinite(error) else text
