"""Coactivation: which experts serve the same tokens, beside what independent choice would give."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis import style
from analysis.matrices import Wording, between, explain_gaps, present
from analysis.series import expert_names, final
from graphmoe.checkpoint import RunRecord

TICKS = (1 / 4, 1 / 2, 1, 2, 4)
FINE_TICKS = (1 / 2, 2 / 3, 4 / 5, 9 / 10, 1, 1.1, 5 / 4, 3 / 2, 2)
"""Ratios that the colour scale may name; the fine ones where none is above 2."""
_MOST = 2.0  # the colours end at a factor of 2 ** 2: rare pairs meet never, or often, by accident


@style.styled
def expert_coactivation(record: RunRecord) -> Figure:
    """How often two experts serve the same token, and how often independent choice would let them.

    Left of each pair of panels the share of held-out tokens (on the diagonal: of one expert), right of it
    the ratio to the share that experts have which are chosen independently, each as often as it is.
    """
    together, ratio = meetings(record)
    kept, names = present(together), expert_names(record)
    left_out = [name for expert, name in enumerate(names) if expert not in kept]
    names = [names[expert] for expert in kept]
    together, ratio = together[:, kept][:, :, kept], ratio[:, kept][:, :, kept]
    shown = style.shown_layers(len(together))
    numbers = len(kept) <= 10
    side = 0.31 * len(kept) if numbers else 0.2 * len(kept)
    side = float(np.clip(side, 1.8 if len(shown) > 1 else 2.6, 3.1))
    rows, columns = style.grid_shape(len(shown), 2 * side + 0.8)
    fig = style.new_figure(
        max((2 * side + 0.8) * columns + 1.9, 7.4),
        (side + 0.7) * rows + 0.9,
        "Experts that serve the same tokens (held-out text)",
        layout="compressed",
    )
    axes = style.panels(fig, 2 * len(shown), 2 * columns)
    images = _draw(axes, together[shown], ratio[shown], numbers=numbers)
    for place, ax in enumerate(axes):
        layer, what = shown[place // 2], "times chance" if place % 2 else "% of tokens"
        ax.set_title(f"layer {layer}, {what}")
        style.name_ticks(ax, names, axis="x")
        style.name_ticks(ax, names, axis="y")
        if place % (2 * columns) == 0:
            ax.set_ylabel("expert")
        if place // 2 + columns >= len(shown):
            ax.set_xlabel("expert")
    _scales(fig, axes, *images)
    note = "diagonal: tokens the expert serves"
    if np.isfinite(between(together)).any():
        note += f"   ·   an average pair: {np.nanmean(between(together)):.1f} %, whoever chooses"
    wording = Wording("", "", "", "", "meeting", "a ghost was dormant or an expert idle", note)
    fig.supxlabel(explain_gaps(together, left_out, wording), fontsize=8, color=style.QUIET)
    return fig


def meetings(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Return who meets at how many tokens, in per cent, and that over chance, both ``[L, E, E]``.

    NaN where one of two serves nobody, and for the ratio on the diagonal.
    """
    together, chance = final(record, "coactivation"), final(record, "coactivation_random")
    serves = together.diagonal(axis1=1, axis2=2) > 0  # [L, E]
    both = serves[:, :, None] & serves[:, None]
    chance = between(np.where(both & (chance > 0), chance, np.nan))
    return np.where(both, 100 * together, np.nan), together / chance


def is_choice(record: RunRecord) -> bool:
    """Whether who meets whom is open: not where a token has one expert, or all of them.

    What cannot be read is: drawing it says what is wrong.
    """
    values = record.records["final_coactivation_random"]
    if values.ndim != 3 or values.shape[1] != values.shape[2] or not np.isfinite(between(values)).any():
        return True
    chance = between(values)
    return bool(((chance > 0) & (chance < 0.999)).any())


def _draw(
    axes: Sequence[Axes], together: np.ndarray, ratio: np.ndarray, *, numbers: bool
) -> tuple[AxesImage, AxesImage]:
    """Fill the panels, two a layer, from ``[L, E, E]`` each; one image of each kind is returned."""
    share = Normalize(0, max(float(np.nanmax(between(together), initial=0)), 1e-9))
    exponent = np.log2(np.maximum(ratio, 2.0**-9))
    bound = float(np.clip(np.nanmax(np.abs(exponent), initial=0), np.log2(1.1), _MOST))
    scale = Normalize(-bound, bound)
    form, ratio_form = ("{:.1f}".format, "{:.2f}".format) if numbers else (None, None)
    for layer in range(len(together)):
        left = style.heatmap(
            axes[2 * layer],
            between(together)[layer],
            numbers=together[layer],
            cmap="cividis",
            norm=share,
            form=form,
        )
        right = style.heatmap(
            axes[2 * layer + 1],
            exponent[layer].clip(-bound, bound),
            numbers=ratio[layer],
            cmap="PuOr_r",
            norm=scale,
            form=ratio_form,
        )
    return left, right


def _scales(fig: Figure, axes: Sequence[Axes], left: AxesImage, right: AxesImage) -> None:
    """Add both colour scales, to the right of all panels."""
    rows = axes[0].get_gridspec().nrows
    places = {"ax": list(axes), "aspect": 22 * min(rows, 3), "pad": 0.015}
    places |= {"shrink": min(1.0, 3 / rows), "anchor": (0.0, 1.0)}
    low, high = right.get_clim()
    ends = {"extend": "both" if high == _MOST else "neither", "extendfrac": 0.03}
    scale = fig.colorbar(right, label="times what independent choice gives", **places, **ends)
    ticks = [tick for tick in (TICKS if high > 1 else FINE_TICKS) if low <= np.log2(tick) <= high]
    scale.set_ticks(np.log2(ticks), labels=[f"{tick:.3g}" for tick in ticks])
    scale.outline.set_visible(False)
    fig.colorbar(left, label="tokens that both serve, %", **places).outline.set_visible(False)
