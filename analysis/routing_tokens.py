"""The tokens of a text and the expert that each of them is given, layer by layer."""

import colorsys
import functools
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch

from analysis import style
from analysis.routing import Routed, routed, tokens_of
from graphmoe.checkpoint import RunRecord

MAX_TOKENS = 160
"""Tokens that are shown; of more, the first."""
_ROW = 40  # tokens side by side
_CELL = (0.29, 0.2)  # inches
_LABEL = 14  # characters of a token's text
_FAINT = 0.18  # opacity of a token whose experts weigh the same
_MARKS = str.maketrans({" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"})


@style.styled
def routing_tokens(record: RunRecord) -> Figure:
    """The expert of the largest weight for every token, in every layer: the fuller, the more of the weight.

    A cell is faint where all experts of the token weigh the same, and full where one has all the weight. A
    dot stands for a space, ↵ for a line break.
    """
    found = routed(record)
    layers = style.shown_layers(len(found.layers))
    rows = _rows(found, most=max(1, int(23 // _row_height(len(layers)))))
    shown, experts = sum(map(len, rows)), found.load.shape[1]
    width = max(max(map(len, rows)), 12)
    title = f"First expert of every token ({tokens_of(found)})"
    if shown < len(found.labels):
        title += f": the first {shown}, {len(found.labels) - shown:,} more left out"
    height = len(rows) * _row_height(len(layers)) + 1.2
    fig = style.new_figure(max(_CELL[0] * width + 1.9, 7.0), height, title)
    axes = style.panels(fig, len(rows), 1)
    colours = expert_colours(experts)
    for ax, tokens in zip(axes, rows, strict=True):
        _draw(ax, found, tokens, layers, colours)
        ax.set_xlim(-0.5, width - 0.5)
    if (found.degree > 1).any():
        scale = LinearSegmentedColormap.from_list("opacity", [_over_white(np.zeros(3), _FAINT), "black"])
        places = {"ax": axes, "aspect": 14, "pad": 0.015, "shrink": min(1.0, 1.6 / height * 1.6)}
        bar = fig.colorbar(
            ScalarMappable(Normalize(0, 1), scale), label="weight of the first expert", **places
        )
        bar.set_ticks([0, 1], labels=["as the\nothers", "all"])
        bar.outline.set_visible(False)
    if experts <= 24:
        patches = [Patch(color=colour, label=str(expert)) for expert, colour in enumerate(colours)]
        fig.legend(handles=patches, loc="outside lower center", ncols=12, title="expert", title_fontsize=8.5)
    else:
        fig.supxlabel(
            "the number in a cell is its expert, and so is its colour", fontsize=8, color=style.QUIET
        )
    return fig


def expert_colours(num_experts: int) -> list[tuple[float, float, float]]:
    """Return one colour an expert; neighbours differ much, but only some 20 can be told apart by colour."""
    if num_experts <= len(style.PRIMARIES):
        return [to_rgb(colour) for colour in style.PRIMARIES[:num_experts]]
    golden = (math.sqrt(5) - 1) / 2
    lightness = (0.36, 0.56, 0.46)
    return [
        colorsys.hls_to_rgb((0.6 + golden * expert) % 1, lightness[expert % 3], 0.62)
        for expert in range(num_experts)
    ]


def token_label(text: str) -> str:
    """Write a token so that spaces and line breaks are seen; what the font does not have is a box."""
    text = text.translate(_MARKS) or "∅"
    text = text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"
    return style.plain("".join(char if ord(char) in _glyphs() else "□" for char in text))


@functools.cache
def _glyphs() -> frozenset[int]:
    with style.look():
        return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _row_height(layers: int) -> float:
    return _CELL[1] * layers + 1.05


def _rows(found: Routed, *, most: int) -> list[np.ndarray]:
    """The tokens of each row of the picture; a sequence begins a new one."""
    rows: list[np.ndarray] = []
    left = MAX_TOKENS
    for sequence in dict.fromkeys(found.sequence.tolist()):
        tokens = np.flatnonzero(found.sequence == sequence)[:left]
        left -= len(tokens)
        rows += [tokens[start : start + _ROW] for start in range(0, len(tokens), _ROW)]
    return rows[:most]


def _draw(ax: Axes, found: Routed, tokens: np.ndarray, layers: list[int], colours: list[tuple]) -> None:
    first, degree = found.first[tokens][:, layers].T, found.degree[tokens][:, layers].T  # [L, N]
    weight = np.nan_to_num(found.first_weight[tokens][:, layers].T)
    even = 1 / np.maximum(degree, 1)
    strength = np.where(degree > 1, (weight - even) / np.maximum(1 - even, 1e-9), 1).clip(0, 1)
    cells = _over_white(np.array(colours)[first.clip(0)], (_FAINT + (1 - _FAINT) * strength)[..., None])
    cells[first < 0] = to_rgb(style.EMPTY)
    ax.imshow(cells, aspect="auto", interpolation="nearest")
    for (layer, place), expert in np.ndenumerate(first):
        ink = "black" if cells[layer, place] @ (0.299, 0.587, 0.114) > 0.52 else "white"
        text = "–" if expert < 0 else str(expert)
        ax.text(place, layer, text, ha="center", va="center", color=ink, fontsize=6.2, in_layout=False)
    ax.set_xticks(range(len(tokens)), [token_label(found.labels[token]) for token in tokens], rotation=90)
    ax.xaxis.tick_top()
    style.name_ticks(ax, [str(found.layers[layer]) for layer in layers], axis="y")
    ax.tick_params(length=0)
    ax.set_ylabel("layer")
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _over_white(colour: np.ndarray, opacity: np.ndarray | float) -> np.ndarray:
    return 1 - (1 - colour) * opacity
