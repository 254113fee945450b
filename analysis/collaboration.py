"""Collaboration: who listens to whom among the experts of a token, and what the mediator has to say."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis import style
from analysis.lines import layer_colours, layer_legend, layer_lines
from analysis.matrices import Wording, draw_matrices
from analysis.series import expert_names, final, has, series, steps
from graphmoe.checkpoint import RunRecord

MEDIATOR = "M"
"""Name of the mediator among the experts."""


@style.styled
def collaboration_attention(record: RunRecord) -> Figure:
    """Attention of each expert (row) to each other (column) while they collaborate on held-out text.

    Orange is more than a node that listens to all of its token alike gives each of them, purple is less.
    """
    attention, uniform = final(record, "attention"), final(record, "attention_uniform")
    names, mediated = expert_names(record), attention.shape[1] > len(expert_names(record))
    if mediated:
        names.append(MEDIATOR)
    centre = float(np.nanmean(uniform)) if np.isfinite(uniform).any() else 0.5
    reach = max(float(np.nanmax(np.abs(attention - centre), initial=0)), 0.02 * centre)
    wording = Wording(
        "Collaboration attention (held-out text)",
        "listening",
        "speaking",
        "attention, mean over tokens that have both",
        "attention",
        "never at one token",
        f"{MEDIATOR}: mediator" if mediated else "",
    )
    norm = Normalize(centre - reach, centre + reach)
    fig, axes = draw_matrices(attention, names, wording, norm=norm, cmap="PuOr_r", diagonal=True)
    for ax, layer in zip(axes, style.shown_layers(len(attention)), strict=True):
        ax.set_title(f"layer {layer} · uniform {uniform[layer]:.3f}")
    scale = fig.axes[-1]
    scale.set_ylim(max(centre - reach, 0), min(centre + reach, 1))
    scale.axhline(centre, color=style.INK, linewidth=1.2, linestyle="--")
    return fig


@style.styled
def mediator_gate(record: RunRecord) -> Figure:
    """Share of the mediator in what returns to a token: over depth after training, and in training.

    At 0.5 the mediator counts as much as all experts of the token together.
    """
    ended, over_time = has(record, "final_mediator_gate"), has(record, "mediator_gate")
    count = ended + over_time
    fig = style.new_figure(4.4 * count + 1.4, 3.4, "Mediator gate")
    axes = style.panels(fig, count, count, sharey=True)
    axes[0].set_ylabel("share of the mediator, γ")
    if ended:
        _over_depth(axes[0], record)
    if over_time:
        values, at = series(record, "mediator_gate"), steps(record)
        colours = layer_colours(values.shape[1])
        layer_lines(axes[-1], at, values, colours)
        axes[-1].set_title("In training, mean over tokens")
    else:
        colours = []
    even = [ax.axhline(0.5, color=style.QUIET, linestyle="--", linewidth=1.2, label="even") for ax in axes]
    axes[0].set_ylim(0, 1)
    layer_legend(fig, colours, even[0])
    return fig


def _over_depth(ax: Axes, record: RunRecord) -> None:
    """Draw mean and spread over tokens of each layer."""
    mean, layers = final(record, "mediator_gate"), np.arange(len(final(record, "mediator_gate")))
    spread = final(record, "mediator_gate_std") if has(record, "final_mediator_gate_std") else None
    look = {"color": style.BLUE, "markersize": 5, "linewidth": 1.4, "capsize": 3, "elinewidth": 1.2}
    ax.errorbar(layers, mean, yerr=spread, fmt="o-", **look)
    ax.set_title("Held-out text, ± deviation over tokens")
    style.name_ticks(ax, [str(layer) for layer in layers], axis="x")
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_xlabel("layer")
