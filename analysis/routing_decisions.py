"""How decided the routing of a text is, and how far it follows from the token before, beside chance."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.lines import from_zero
from analysis.routing import Routed, panel_layers, routed, tokens_of
from graphmoe.checkpoint import RunRecord


@style.styled
def routing_decisions(record: RunRecord) -> Figure:
    """Entropy of the tokens' weights, and how often a token has the first expert of the one before it.

    Dashed: the entropy of equal weights; how often two tokens of the text have the same first expert wherever
    they stand. The grey band is two standard deviations of as many independent pairs.
    """
    found = routed(record)
    draw = [_entropy] if (found.degree > 1).any() else []
    draw += [_repeats] if np.isfinite(repeats(found)[0]).any() else []
    width = float(np.clip(0.3 * len(found.layers) + 2.2, 4.2, 6.4))
    fig = style.new_figure(width * max(len(draw), 1), 3.5, f"Routing of {tokens_of(found)}")
    for ax, panel in zip(style.panels(fig, max(len(draw), 1), max(len(draw), 1)), draw, strict=False):
        panel(ax, found)
        style.name_ticks(ax, panel_layers(found), axis="x")
        ax.set_xlim(-0.5, len(found.layers) - 0.5)
        ax.set_xlabel("layer")
        ax.legend(loc="upper center", ncols=3, columnspacing=1.2, handlelength=1.4)
    return fig


def repeats(found: Routed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often a token's first expert is that of the token before it in its sequence, and what chance gives.

    Returns:
        Share of the neighbours; share of all pairs of tokens, that is of neighbours if the tokens were
        shuffled; standard deviation of the former in that case. ``[L]`` each, NaN without a pair.
    """
    before, after = found.first[:-1], found.first[1:]  # [N - 1, L]
    pair = (found.sequence[1:] == found.sequence[:-1])[:, None] & (before >= 0) & (after >= 0)
    number = pair.sum(axis=0)
    experts = np.arange(found.load.shape[1])
    counts = (found.first[:, :, None] == experts).sum(axis=0)  # [L, E]
    total = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = ((before == after) & pair).sum(axis=0) / number
        chance = (counts * (counts - 1)).sum(axis=1) / (total * (total - 1))
        return share, chance, np.sqrt(chance * (1 - chance) / number)


def _entropy(ax: Axes, found: Routed) -> None:
    several = np.where(found.degree > 1, found.entropy, np.nan)  # [N, L]
    known = np.isfinite(several).any(axis=0)
    mean, low, high = (np.full(len(known), np.nan) for _ in range(3))
    mean[known] = np.nanmean(several[:, known], axis=0)
    low[known], high[known] = np.nanquantile(several[:, known], (0.1, 0.9), axis=0)
    even = np.log2(np.maximum(found.degree, 1)).mean(axis=0)
    layers = np.arange(len(mean))
    # Not error bars: of few undecided tokens among many decided ones the mean lies outside.
    ax.vlines(layers, low, high, color=style.BLUE, linewidth=1.4)
    ax.plot(layers, mean, "o", color=style.BLUE, markersize=4, label="mean, 10 to 90 % of tokens")
    _reference(ax, even, "equal weights")
    ax.set_title("Entropy of a token's weights")
    ax.set_ylabel("bits per token")
    from_zero(ax, 1.2 * np.append(high, even))


def _repeats(ax: Axes, found: Routed) -> None:
    share, chance, spread = (100 * values for values in repeats(found))
    layers = np.arange(len(share))
    ax.plot(layers, share, "o-", color=style.BLUE, markersize=4, linewidth=1.4, label="this text")
    low, high = ((chance + sign * 2 * spread).clip(0, 100) for sign in (-1, 1))
    _reference(ax, chance, "tokens shuffled")
    ax.bar(layers, high - low, 0.8, bottom=low, color=style.EMPTY, zorder=0, label="± 2 deviations")
    ax.set_title("Same first expert as the token before")
    ax.set_ylabel("tokens, %")
    from_zero(ax, 1.2 * np.concatenate([share, chance + 2 * spread]))


def _reference(ax: Axes, values: np.ndarray, label: str) -> None:
    places = np.arange(len(values))
    ax.hlines(values, places - 0.4, places + 0.4, color=style.ORANGE, linewidth=1.6, label=label)
