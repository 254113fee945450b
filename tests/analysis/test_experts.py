"""What the pictures of connections, hyperedges, specialisation and orthogonality say."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fake_run import cells, change, texts, write_run
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

import analysis
from analysis.connections import strongest
from analysis.hypergraph import MAX_HYPEREDGES, spread
from analysis.lines import apart
from analysis.load import load_entropy
from analysis.orthogonality import least_overlap
from graphmoe.checkpoint import RunRecord, read


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Two layers, primaries 0 to 3, ghost g0 (expert 4) awake at the end and g1 dormant throughout."""
    return read(write_run(tmp_path_factory.mktemp("runs") / "ghosts"))


def draw(record: RunRecord, name: str) -> Figure:
    return analysis.plots(record)[name](record)


def curve(figure: Figure, panel: int, label: str) -> np.ndarray:
    """The heights of a line of one panel, by its label."""
    (line,) = (line for line in figure.axes[panel].lines if line.get_label() == label)
    return line.get_ydata()


# Training curves and load ----------------------------------------------------------------------


def test_perplexity_is_drawn_beside_bits_per_byte(record: RunRecord):
    figure = draw(record, "training_curves")
    found = {ax.get_ylabel(): ax.lines[0].get_ydata() for ax in figure.axes}
    expected = [line["perplexity"] for line in record.metrics if line["kind"] == "eval"]
    assert np.allclose(found["perplexity per token"], expected)
    assert len(found["bits per byte"]) == len(expected)


def test_learning_rates_are_those_of_primaries_and_the_mean_over_layers_of_each_ghost(record: RunRecord):
    rates = record.records["ghost_learning_rate"] * np.array([0.5, 1.0])[:, None]  # layers that differ
    record = record._replace(records=record.records | {"ghost_learning_rate": rates})
    figure = draw(record, "training_curves")
    panel = [ax.get_ylabel() for ax in figure.axes].index("learning rate")
    assert np.allclose(curve(figure, panel, "g0"), (rates[:, 0, 0] + rates[:, 1, 0]) / 2)
    assert rates[-1, 0, 0] > 0 and not curve(figure, panel, "g1").any()
    primary = [line["lr"] for line in record.metrics if line["kind"] == "train"]
    assert np.allclose(curve(figure, panel, "primary"), primary)
    assert figure.axes[panel].get_title() == "Learning rate (ghosts: mean over layers)"


def test_load_entropy_is_a_fraction_of_the_live_experts():
    share = np.array([[25.0, 25, 25, 25], [100, 0, 0, 0], [50, 50, np.nan, np.nan], [30, 10, np.nan, np.nan]])
    quarter = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert np.allclose(load_entropy(share), [1, 0, 1, quarter])
    assert load_entropy(np.array([[7.0, np.nan]])).tolist() == [1.0]
    assert np.isnan(load_entropy(np.zeros((1, 3)))).all()


def test_load_entropy_stands_beside_max_violation(record: RunRecord):
    share = record.records["load"][-5:].mean(0)[:, :5]
    part = share / share.sum(1, keepdims=True)
    entropy = -(part * np.log2(part)).sum(1) / np.log2(5)
    found = texts(draw(record, "expert_load"))
    assert {"MaxVio", "entropy", *(f"{value:.3f}" for value in entropy)} <= set(found)
    assert f"entropy {entropy[1]:.3f}" in draw(record, "expert_load_over_time").axes[1].get_title()


# Connections over time -------------------------------------------------------------------------


def test_every_pair_has_a_line_of_its_mean_strength(record: RunRecord):
    figure, coupling = draw(record, "expert_connections_over_time"), record.records["coupling"]
    assert len(figure.axes) == 2
    drawn = [line.get_ydata() for line in figure.axes[1].lines]
    assert len(drawn) == 10  # pairs of five experts: g1 never woke
    mean = (coupling[:, 1, 0, 2] + coupling[:, 1, 2, 0]) / 2
    assert any(np.allclose(line, mean) for line in drawn)
    asleep = record.records["ghost_phase"][:, 1, 0] == 0
    late = [line for line in drawn if np.isnan(line).any()]
    assert len(late) == 4 and all((np.isnan(line) == asleep).all() for line in late)


def test_the_strongest_pairs_are_named_and_ghosts_are_dashed(record: RunRecord):
    figure, last = draw(record, "expert_connections_over_time"), record.records["coupling"][-1, 0]
    strength = (last + last.T) / 2
    names = ["0", "1", "2", "3", "g0"]
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    order = sorted(pairs, key=lambda pair: -strength[pair])
    expected = [pair for pair in order if pair[1] < 4][:3] + [pair for pair in order if pair[1] == 4][:2]
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {f"{names[a]}·{names[b]}" for a, b in expected}
    dashed = sum(line.get_linestyle() == "--" for line in figure.axes[0].lines)
    assert dashed == 4


def test_strongest_is_by_size_and_never_a_missing_one():
    last = {(0, 1): 0.1, (0, 2): -0.5, (1, 2): float("nan"), (1, 3): 0.1}
    assert strongest(last, 3) == [(0, 2), (0, 1), (1, 3)]
    assert strongest({}, 3) == [] and strongest(last, 0) == []


def test_names_at_line_ends_never_meet():
    moved = apart(np.array([0.5, 0.5, 0.5, 0.97, 1.4]), gap=0.08)
    assert np.diff(moved).min() > 0.075 and moved.min() >= 0 and moved.max() <= 1
    assert np.allclose(apart(np.array([0.1, 0.6]), gap=0.08), [0.1, 0.6])
    assert apart(np.zeros(0), gap=0.1).shape == (0,)


# Hypergraph ------------------------------------------------------------------------------------


def squares(figure: Figure, panel: int) -> np.ndarray:
    """Where the hyperedges of one panel are."""
    (points,) = (item for item in figure.axes[panel].collections if isinstance(item, PathCollection))
    return points.get_offsets()


def test_every_awake_hyperedge_is_joined_to_its_members(record: RunRecord):
    figure = draw(record, "hypergraph")
    panel = figure.axes[0]
    lines = [item for item in panel.collections if isinstance(item, LineCollection)]
    assert len(lines) == 10 == len(squares(figure, 0))
    assert all(len(item.get_segments()) == 2 for item in lines)
    circles = np.array([patch.center for patch in panel.patches])
    assert len(circles) == 6  # a dormant ghost keeps its place
    for line, square in zip(lines, squares(figure, 0), strict=True):
        ends = np.array(line.get_segments())
        assert np.allclose(ends[:, 0], square)
        assert np.linalg.norm(ends[:, 1, None] - circles, axis=-1).min(axis=1).max() < 1e-9
    assert panel.get_title() == "layer 0 · 5 of 15 dormant"
    named = {"0", "1", "2", "3", "g0", "g1", "dormant ghost", "hyperedge weight"}
    assert named <= set(texts(figure))


def test_strong_hyperedges_are_wide(record: RunRecord):
    figure, weight = draw(record, "hypergraph"), record.records["hyperedge_weight"][-1, 0]
    lines = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    widths = [float(item.get_linewidths()[0]) for item in lines]
    awake = [edge for edge in range(15) if 5 not in record.records["incidence"][0, 2 * edge : 2 * edge + 2]]
    assert widths == sorted(widths) and widths[-1] > 1.5 * widths[0]
    assert np.allclose(np.corrcoef(widths, np.sort(weight[awake]))[0, 1], 1, atol=1e-5)


def test_of_many_hyperedges_the_strongest_are_drawn_and_counted(tmp_path: Path):
    figure = draw(read(write_run(tmp_path / "run", layers=1, primaries=12, ghosts=0)), "hypergraph")
    assert figure.axes[0].get_title() == "layer 0 · strongest 36 of 66"
    assert len(squares(figure, 0)) == MAX_HYPEREDGES == 36


def test_a_hypergraph_without_learned_weights_is_drawn_alike(tmp_path: Path):
    run = change(write_run(tmp_path / "run", ghosts=0, strategy="all", size=4), hyperedge_weight=None)
    figure = draw(read(run), "hypergraph")
    assert [ax.get_title() for ax in figure.axes] == ["layer 0", "layer 1"]  # and no colour scale
    assert len(squares(figure, 0)) == 1
    assert "hyperedge_weights" not in analysis.plots(read(run))


def test_hyperedges_with_one_centre_are_spread():
    circle = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    moved = spread(np.zeros((5, 2)), circle, gap=0.2)
    distance = np.linalg.norm(moved[:, None] - moved, axis=-1) + np.eye(5)
    assert distance.min() > 0.15 and np.abs(moved).max() < 0.5
    alone = spread(np.array([[0.3, 0.3]]), circle, gap=0.2)
    assert np.allclose(alone, 0.3, atol=0.01)
    assert spread(np.zeros((0, 2)), circle, gap=0.2).shape == (0, 2)


def test_drawing_a_hypergraph_does_not_need_pyplot(record: RunRecord, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would be an error
    assert len(draw(record, "hypergraph").axes) == 3


# Specialisation --------------------------------------------------------------------------------


def test_specialisation_stands_beside_random_vectors(record: RunRecord):
    figure = draw(record, "specialisation")
    assert np.allclose(curve(figure, 1, "training batches"), record.records["specialisation"][:, 1])
    assert np.allclose(curve(figure, 1, "random vectors"), 0.83)
    assert np.allclose(curve(figure, 1, "held-out text"), 0.75)
    assert figure.axes[0].get_title() == "layer 0 · random 0.83"


def test_specialisation_without_measures_at_the_end_has_no_reference(tmp_path: Path):
    gone = dict.fromkeys(("final_specialisation", "final_specialisation_random"))
    figure = draw(read(change(write_run(tmp_path / "run"), **gone)), "specialisation")
    assert [line.get_label() for line in figure.axes[0].lines] == ["training batches"]
    assert figure.axes[0].get_title() == "layer 0"


def test_similarity_is_the_recorded_cka_of_live_experts(record: RunRecord):
    figure, cka = draw(record, "expert_similarity"), record.records["final_cka"]
    shown = [values for values in cells(figure) if values.shape == (5, 5)]
    off = ~np.eye(5, dtype=bool)
    assert len(shown) == 2
    assert np.allclose(shown[1][off], cka[1, :5, :5][off])
    found = texts(figure)
    assert {"layer 1 · random 0.034", "linear CKA"} <= set(found) and "1.00" in found
    assert any(text.endswith("left out, without any measurement: g1") for text in found)


def test_routing_information_stands_beside_uniform_and_shuffled(record: RunRecord):
    figure = draw(record, "routing_information")
    entropy, information, over_time = figure.axes
    assert np.allclose([bar.get_height() for bar in entropy.patches], [1.4, 1.1])
    assert np.allclose([bar.get_height() for bar in information.patches], [0.3, 0.55])
    marks = [ax.collections[0].get_segments() for ax in (entropy, information)]
    assert np.allclose([segment[:, 1] for segment in marks[0]], np.log2(5))
    assert np.allclose([segment[:, 1] for segment in marks[1]], 0.06)
    assert np.allclose(over_time.lines[1].get_ydata(), record.records["routing_entropy"][:, 1])
    assert {"1.40", "0.55", "shuffled among tokens", "uniform over live experts"} <= set(texts(figure))


def test_routing_information_shows_what_there_is(tmp_path: Path):
    names = ("routing_entropy", "final_routing_entropy", "final_mutual_information_random")
    figure = draw(read(change(write_run(tmp_path / "run"), **dict.fromkeys(names))), "routing_information")
    (ax,) = figure.axes
    assert ax.get_title().startswith("Mutual information") and not ax.collections


# Orthogonality ---------------------------------------------------------------------------------


def test_orthogonality_shows_strength_on_decades_and_overlap_above_its_bound(record: RunRecord):
    figure = draw(record, "orthogonality")
    strength, overlap = figure.axes
    assert strength.get_yscale() == "log" and overlap.get_yscale() == "linear"
    assert np.allclose(strength.lines[1].get_ydata(), record.records["orthogonality_strength"][:, 1])
    assert np.allclose(overlap.lines[0].get_ydata(), record.records["overlap"][:, 0])
    bound = overlap.lines[-1].get_ydata()
    assert np.allclose(bound[[0, -1]], [1 / 9, 1 / 16])  # four experts, then five
    assert {"layer 0", "layer 1", "least possible"} <= set(texts(figure))


def test_overlap_alone_is_drawn_where_no_loss_pushed(tmp_path: Path):
    run = change(write_run(tmp_path / "run"), orthogonality_strength=None)
    (ax,) = draw(read(run), "orthogonality").axes
    assert ax.get_ylabel() == "mean squared cosine"


def test_centred_vectors_overlap_at_least_as_much_as_a_simplex():
    random = np.random.default_rng(0)
    for experts in (2, 3, 6):
        (least,) = least_overlap(np.ones((1, 2, experts), dtype=bool))
        for scale in (np.ones(experts), np.exp(random.normal(0, 2, experts))):
            rows = scale[:, None] * random.normal(size=(experts, 64))
            rows -= rows.mean(0)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            square = (rows @ rows.T) ** 2
            mean = (square.sum() - experts) / (experts * (experts - 1))
            assert mean >= least - 1e-12
        simplex = np.eye(experts) - 1 / experts
        simplex /= np.linalg.norm(simplex, axis=1, keepdims=True)
        assert np.allclose((simplex @ simplex.T)[0, 1] ** 2, least)
