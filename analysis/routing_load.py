"""Which experts the tokens of a traced pass went to, beside an even load and a blind choice."""

import numpy as np
from matplotlib.figure import Figure

from analysis import style
from analysis.load import draw_load, max_violation, span
from analysis.routing import Routed, panel_layers, routed, tokens_of
from graphmoe.checkpoint import RunRecord


@style.styled
def routing_load(record: RunRecord) -> Figure:
    """Share of the routing edges that each expert gets of this text, layer by layer; × is an idle expert.

    In brackets what is expected if every token chose as many experts at random: few tokens never load all
    experts evenly, and a text whose tokens are alike loads them less evenly still.
    """
    found = routed(record)
    total = np.nansum(found.load, axis=1, keepdims=True)
    share = 100 * found.load / np.maximum(total, 1)
    uniform, spread = even_share(found)
    dead = (found.load == 0).sum(axis=1)
    columns = {
        "MaxVio (blind)": _pairs(max_violation(found.load), found.max_violation, 2),
        "idle (blind)": [f"{count} ({chance:.1f})" for count, chance in zip(dead, found.dead, strict=True)],
    }
    names = [str(expert) for expert in range(share.shape[1])]
    title = f"Expert load of {tokens_of(found)}"
    fig, ax = draw_load(share, uniform, names, panel_layers(found), columns, title, idle="×")
    ax.set_title(f"uniform share {span(uniform)} %, a blind choice ± {span(spread)}")
    ax.set_xlabel("expert")
    if share.shape[1] > 24:  # too many for numbers
        ax.plot(*np.nonzero(found.load == 0)[::-1], "x", color="white", markersize=3.5, markeredgewidth=0.8)
    return fig


def even_share(found: Routed) -> tuple[np.ndarray, np.ndarray]:
    r"""Share of an expert in an even load, and the standard deviation of it in a blind choice, per cent.

    .. math::
        \frac{100}{E}, \qquad \frac{100}{\sum_n d_n} \sqrt{\sum_n \frac{d_n}{E} \Bigl(1 - \frac{d_n}{E}\Bigr)}

    Returns:
        Two arrays ``[L]``.
    """
    live = np.maximum(found.live.sum(axis=1), 1)
    chance = np.minimum(found.degree / live, 1)  # [N, L]
    edges = np.maximum(found.degree.sum(axis=0), 1)
    return 100 / live, 100 * np.sqrt((chance * (1 - chance)).sum(axis=0)) / edges


def _pairs(values: np.ndarray, chance: np.ndarray, places: int) -> list[str]:
    return [f"{value:.{places}f} ({other:.{places}f})" for value, other in zip(values, chance, strict=True)]
