"""What the pictures of collaboration say: who meets, who listens, the mediator, knobs, dropped edges."""

from pathlib import Path

import numpy as np
import pytest
from fake_run import cells, change, texts, write_run
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import analysis
from analysis.coactivation import meetings
from analysis.inference import read_knobs
from graphmoe.checkpoint import RunRecord, read


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Two layers, primaries 0 to 3, ghost g0 (expert 4) awake at the end and g1 dormant throughout."""
    return read(write_run(tmp_path_factory.mktemp("runs") / "ghosts"))


def draw(record: RunRecord, name: str) -> Figure:
    return analysis.plots(record)[name](record)


# Coactivation ----------------------------------------------------------------------------------


def test_pairs_are_shares_of_tokens_beside_their_ratio_to_chance(record: RunRecord):
    figure = draw(record, "expert_coactivation")
    together, chance = (record.records[f"final_coactivation{end}"] for end in ("", "_random"))
    shown, off = [values for values in cells(figure) if values.shape == (5, 5)], ~np.eye(5, dtype=bool)
    assert len(shown) == 4  # two layers, two panels each
    for layer in range(2):
        share, ratio = shown[2 * layer : 2 * layer + 2]
        assert np.allclose(share[off], 100 * together[layer, :5, :5][off])
        expected = np.log2((together[layer] / np.where(chance[layer] > 0, chance[layer], 1))[:5, :5][off])
        assert np.allclose(ratio[off], expected.clip(-2, 2), atol=1e-5)
        assert np.abs(expected).max() > 0.3
        assert np.isnan(share.diagonal()).all() and np.isnan(ratio.diagonal()).all()
    found = texts(figure)
    assert {"layer 0, % of tokens", "layer 1, times chance", "times what independent choice gives"} <= set(
        found
    )
    assert f"{100 * together[0, 1, 1]:.1f}" in found  # how often one serves stands on the diagonal
    # Two experts a token, five awake: 2 * 1 / (5 * 4).
    assert any("left out, without any meeting: g1" in text for text in found)
    assert any("an average pair: 10.0 %, whoever chooses" in text for text in found)


def test_a_pair_that_never_meets_is_zero_and_an_idle_expert_is_empty(record: RunRecord):
    together = record.records["final_coactivation"].copy()
    together[0, 0, 1] = together[0, 1, 0] = 0
    together[1, 2] = together[1, :, 2] = 0
    record = record._replace(records=record.records | {"final_coactivation": together})
    share, ratio = meetings(record)
    assert share[0, 0, 1] == ratio[0, 0, 1] == 0
    assert np.isnan(share[1, 2]).all() and np.isnan(share[1, :, 2]).all() and np.isnan(ratio[1, 2]).all()
    figure = draw(record, "expert_coactivation")
    assert (
        cells(figure)[1][0, 1] == np.nanmin(cells(figure)[1]) == -2
    )  # at the end of the colours, not beyond
    assert "0.00" in texts(figure)
    assert any("a ghost was dormant or an expert idle" in text for text in texts(figure))


@pytest.mark.parametrize("experts", [1, 4])
def test_without_a_choice_who_meets_is_no_news(tmp_path: Path, experts: int):
    run = write_run(tmp_path / "run", ghosts=0)
    load = np.full(4, experts / 4)
    pairs = np.tile(np.where(np.eye(4, dtype=bool), np.diag(load), float(experts == 4)), (2, 1, 1))
    pairs = pairs.astype(np.float32)
    record = read(change(run, final_coactivation=pairs, final_coactivation_random=pairs))
    assert "expert_coactivation" not in analysis.plots(record)


# Attention -------------------------------------------------------------------------------------


def test_attention_has_a_mediator_and_says_what_uniform_is(record: RunRecord):
    figure = draw(record, "collaboration_attention")
    attention = record.records["final_attention"]
    kept = [0, 1, 2, 3, 4, 6]  # g1 is never at a token
    for layer, shown in enumerate(values for values in cells(figure) if values.shape == (6, 6)):
        assert np.allclose(shown, attention[layer][np.ix_(kept, kept)], equal_nan=True)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "1", "2", "3", "g0", "M"]
    found = texts(figure)
    assert {"layer 1 · uniform 0.333", "listening", "speaking"} <= set(found)
    assert any("left out, without any attention: g1" in text and "M: mediator" in text for text in found)
    scale = figure.axes[-1]
    assert np.allclose(scale.lines[0].get_ydata(), 1 / 3)
    assert scale.get_ylim()[0] >= 0


def test_attention_without_a_mediator_is_among_experts(tmp_path: Path):
    run = write_run(tmp_path / "run", ghosts=0)
    attention = read(run).records["final_attention"][:, :4, :4]
    figure = draw(read(change(run, final_attention=attention)), "collaboration_attention")
    assert cells(figure)[0].shape == (4, 4)
    assert not any("mediator" in text for text in texts(figure))


# Mediator and capacity -------------------------------------------------------------------------


def test_the_gate_is_drawn_over_depth_with_its_spread_and_over_time(record: RunRecord):
    figure = draw(record, "mediator_gate")
    depth, time = figure.axes
    (bars,) = (item for item in depth.containers if isinstance(item, ErrorbarContainer))
    assert np.allclose(bars.lines[0].get_ydata(), [0.6, 0.25])
    segments = bars.lines[2][0].get_segments()
    assert np.allclose([segment[:, 1] for segment in segments], [[0.55, 0.65], [0.1, 0.4]])
    assert np.allclose(time.lines[1].get_ydata(), record.records["mediator_gate"][:, 1])
    for ax in (depth, time):
        assert np.allclose(ax.lines[-1].get_ydata(), 0.5) and ax.get_ylim() == (0, 1)
    assert {"even", "layer 0", "layer 1", "share of the mediator, γ"} <= set(texts(figure))


@pytest.mark.parametrize(
    "missing, title",
    [
        (["mediator_gate", "mediator_gate_std"], "Held-out text, ± deviation over tokens"),
        (["final_mediator_gate", "final_mediator_gate_std"], "In training, mean over tokens"),
    ],
)
def test_the_gate_is_drawn_from_what_there_is(tmp_path: Path, missing: list[str], title: str):
    record = read(change(write_run(tmp_path / "run"), **dict.fromkeys(missing)))
    (ax,) = draw(record, "mediator_gate").axes
    assert ax.get_title() == title


def test_dropped_edges_stand_beside_those_of_random_choice(record: RunRecord):
    figure = draw(record, "drop_rate")
    ax, rates = figure.axes[0], record.records["drop_rate"]
    assert np.allclose(ax.lines[1].get_ydata(), 100 * rates[:, 1])
    assert np.allclose(ax.lines[-1].get_ydata(), 1.5)
    assert f"at the end {100 * rates[-5:].mean():.2f} %" in ax.get_title()
    assert {"random choice", "routing edges dropped, %"} <= set(texts(figure))


# Knobs -----------------------------------------------------------------------------------------


def test_the_setting_of_training_is_marked(record: RunRecord):
    figure = draw(record, "inference_knobs")
    curves, table = figure.axes
    one, two = curves.lines
    assert [one.get_label(), two.get_label()] == ["S = 1", "S = 2"]
    assert one.get_xdata().tolist() == [0, 1, 2, 4]
    assert np.allclose(one.get_ydata(), [4.09, 4.03, 4.0, 4.012])
    (ring,) = (item for item in curves.collections if isinstance(item, PathCollection))
    assert np.allclose(ring.get_offsets(), [[2, 4.0]]) and ring.get_label() == "as trained"
    assert curves.get_title() == "Loss (trained with R = 2, S = 1: 4.0000)"
    assert np.allclose(
        table.images[0].get_array(), [[0.09, 0.03, 0, 0.012], [0.2, 0.1, 0.06, 0.08]], atol=1e-6
    )
    written = [text.get_text() for text in table.texts]
    assert written[0] == "+0.0900\n± 0.0040" and written[2] == "as trained"


def test_where_only_steps_can_be_changed_they_are_the_axis(tmp_path: Path):
    changes = {
        "final_inference_loss": np.array([[3.9], [4.0], [3.5]], np.float32),
        "final_inference_error": None,
        "final_inference_steps": np.array([1, 2, 4]),
        "final_inference_rounds": np.array([0]),
        "final_inference_trained": np.array([2, 0]),
    }
    figure = draw(read(change(write_run(tmp_path / "run"), **changes)), "inference_knobs")
    curves, table = figure.axes
    (line,) = curves.lines
    assert line.get_xdata().tolist() == [1, 2, 4] and np.allclose(line.get_ydata(), [3.9, 4.0, 3.5])
    assert curves.get_xlabel() == "steps of reasoning, S"
    assert curves.get_title() == "Loss (trained with S = 2: 4.0000)"
    assert [text.get_text() for text in table.texts] == ["−0.1000", "as trained", "−0.5000"]


def test_knobs_are_read_with_the_place_of_training(record: RunRecord):
    knobs = read_knobs(record)
    assert knobs.trained == (0, 2) and knobs.loss[knobs.trained] == np.float32(4)
    assert knobs.error[0, 1] == np.float32(0.002)
