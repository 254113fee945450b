"""Pictures of a traced pass: what they compute beside a loop, and that names stay readable."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection

from analysis.report import Report
from analysis.routing import routed
from analysis.routing_decisions import repeats
from analysis.routing_graph import _REACH, more_than_chance, neighbours
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError
from graphmoe.metrics import random_coactivation


def traced(choices: list[list[tuple[int, ...]]], experts: int, sequence=None) -> RunRecord:
    """The record of a pass in which token ``n`` of layer ``l`` went to ``choices[l][n]``, the first first."""
    layers, tokens = len(choices), len(choices[0])
    served = np.zeros((layers, tokens, experts))
    for layer, row in enumerate(choices):
        for token, chosen in enumerate(row):
            served[layer, token, list(chosen)] = 1
    together = np.einsum("lne,lnf->lef", served, served) / tokens
    independent = [random_coactivation(torch.from_numpy(pair.diagonal().copy())).numpy() for pair in together]
    degree = served.sum(axis=2).T.astype(np.int64)
    records = {
        "routed_layer": np.arange(layers),
        "routed_sequence": np.zeros(tokens, np.int64) if sequence is None else np.array(sequence),
        "routed_degree": degree,
        "routed_first": np.array([[chosen[0] for chosen in row] for row in choices]).T,
        "routed_first_weight": np.full((tokens, layers), 0.6),
        "routed_entropy": np.log2(degree) * 0.9,
        "routed_load": served.sum(axis=1),
        "routed_max_violation_random": np.zeros(layers),
        "routed_dead_random": np.zeros(layers),
        "routed_graph_layer": np.arange(layers),
        "routed_coactivation": together,
        "routed_coactivation_random": np.stack(independent),
    }
    meta = {"tokens": json.dumps([str(token) for token in range(tokens)])}
    return RunRecord(Path("trace"), {}, [], records, meta, {})


def blind(tokens: int, experts: int, k: int, layers: int = 2, seed: int = 0) -> list:
    random = np.random.default_rng(seed)
    return [[tuple(random.permutation(experts)[:k].tolist()) for _ in range(tokens)] for _ in range(layers)]


def lines(figure) -> list[int]:
    """Lines in each of two panels."""
    found = [[c for c in ax.collections if isinstance(c, LineCollection)] for ax in figure.axes[:2]]
    return [len(of_panel[0].get_segments()) for of_panel in found]


@pytest.mark.parametrize(
    "tokens, count, chance", [(1, 1, 0.3), (20, 7, 0.2), (150, 0, 0.01), (150, 140, 0.9)]
)
def test_probability_of_meetings_is_the_sum_of_the_formula(tokens, count, chance):
    terms = (
        math.comb(tokens, m) * chance**m * (1 - chance) ** (tokens - m) for m in range(count, tokens + 1)
    )
    found = more_than_chance(np.array([count]), np.array([chance]), tokens)
    np.testing.assert_allclose(found, [sum(terms)], rtol=1e-9)


def test_repeats_are_counted_by_hand():
    sequence = [0] * 7 + [1] * 5
    choices = blind(12, 3, 2)
    share, chance, spread = repeats(routed(traced(choices, 3, sequence)))
    for layer, row in enumerate(choices):
        first = [chosen[0] for chosen in row]
        pairs = [n for n in range(1, 12) if sequence[n] == sequence[n - 1]]
        same = sum(first[n] == first[n - 1] for n in pairs) / len(pairs)
        shuffled = [first[a] == first[b] for a in range(12) for b in range(12) if a != b]
        assert share[layer] == pytest.approx(same)
        assert chance[layer] == pytest.approx(np.mean(shuffled))
        assert spread[layer] == pytest.approx((chance[layer] * (1 - chance[layer]) / len(pairs)) ** 0.5)


def test_every_layer_has_a_band_of_its_own():
    record = traced(blind(200, 4, 2, layers=3), 4)
    _, chance, spread = repeats(routed(record))
    ax = Report(record, "routing_decisions")["routing_decisions"].axes[1]
    assert [bar.get_y() for bar in ax.patches] == pytest.approx(list(100 * (chance - 2 * spread)))
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(list(400 * spread))
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    assert all(left[1] < right[0] for left, right in pairwise(edges))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["this text", "tokens shuffled", "± 2 deviations"]


def test_a_mean_may_lie_outside_of_what_most_tokens_have():
    record = traced(blind(100, 4, 2), 4)
    record.records["routed_entropy"][:] = 1.0
    record.records["routed_entropy"][:5] = 0.0
    ax = Report(record, "routing_decisions")["routing_decisions"].axes[0]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0.95, 0.95])
    assert [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()] == [[1.0, 1.0]] * 2


def test_pairs_that_meet_by_choice_are_drawn_and_others_are_not():
    plain = Report(traced(blind(300, 6, 2), 6), "routing_graph")["routing_graph"]
    assert lines(plain) == [0, 0] and len(plain.axes) == 2  # and no scale of nothing
    choices = blind(300, 6, 2)
    choices[1] = [(4, 5) if chosen[0] == 4 else chosen for chosen in choices[1]]
    planted = Report(traced(choices, 6), "routing_graph")["routing_graph"]
    assert lines(planted) == [0, 1] and len(planted.axes) == 3
    assert "1 of 15 pairs" in planted.axes[1].get_title()


@pytest.mark.parametrize("experts", [4, 8, 16, 32])
def test_names_lie_outside_the_experts(experts):
    """Also that of an expert which serves nearly everybody, and a rare one is still to be seen."""
    choices = [[(0, 1 + n % (experts - 1)) for n in range(300)]]
    choices[0][0] = (experts - 1, experts - 2)
    figure = Report(traced(choices, experts), "routing_graph")["routing_graph"]
    figure.savefig("/dev/null", format="raw")  # lays out
    ax = figure.axes[0]
    unit = ax.transData.transform([1, 0])[0] - ax.transData.transform([0, 0])[0]  # pixels
    nodes = [c for c in ax.collections if isinstance(c, PathCollection)]
    places = np.concatenate([np.asarray(c.get_offsets()) for c in nodes])
    sizes = np.concatenate([np.broadcast_to(c.get_sizes(), len(c.get_offsets())) for c in nodes])
    radius = np.sqrt(sizes) / 2 * figure.dpi / 72 / unit
    assert len(ax.texts) == experts and sizes.min() >= 7
    for text in ax.texts:
        box = text.get_window_extent().transformed(ax.transData.inverted())
        near = np.clip(places, [box.x0, box.y0], [box.x1, box.y1])
        assert (np.hypot(*(near - places).T) > radius).all(), text.get_text()
        assert max(abs(box.extents)) < _REACH


def test_who_meets_is_near():
    order = neighbours(6, np.array([[0, 3], [3, 5], [1, 4]]), np.ones(3))
    assert sorted(order) == list(range(6))
    place = np.argsort(order)
    assert {abs(place[0] - place[3]), abs(place[3] - place[5]), abs(place[1] - place[4])} == {1}
    assert order[-1] == 2  # meets nobody


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("routed_first", np.full((5, 2), 9), "'routed_first' is out of range"),
        ("routed_load", np.ones((2, 3)), "does not fit the other records"),
    ],
)
def test_wrong_records(key, value, message):
    record = traced(blind(5, 4, 2), 4)
    record.records[key] = value
    with pytest.raises(CheckpointError, match=message):
        routed(record)


def test_one_label_a_token():
    record = traced(blind(5, 4, 2), 4)
    record.meta["tokens"] = json.dumps(["a"])
    with pytest.raises(CheckpointError, match="these are not the tokens of the trace"):
        routed(record)
