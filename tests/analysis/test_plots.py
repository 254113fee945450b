"""Plots and report of fake runs, written to disk in the format of a real one."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fake_run import HOSTILE, cells, change, texts, write_run
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

import analysis
from analysis.__main__ import main
from analysis.curves import smooth
from analysis.ghost import transitions
from analysis.hyperedges import hyperedge_members
from analysis.load import max_violation
from analysis.report import Report
from analysis.series import live, metric, settled
from graphmoe.checkpoint import read
from graphmoe.errors import CheckpointError, ConfigError

ALL = [
    "training_curves",
    "expert_load",
    "expert_load_over_time",
    "drop_rate",
    "expert_coactivation",
    "expert_connections",
    "expert_connections_change",
    "expert_connections_over_time",
    "hypergraph",
    "hyperedge_weights",
    "ghost_timeline",
    "collaboration_attention",
    "mediator_gate",
    "inference_knobs",
    "specialisation",
    "expert_similarity",
    "routing_information",
    "orthogonality",
]
OVER_TIME = {"expert_connections_change", "expert_connections_over_time"}
HYPEREDGES = {"hypergraph", "hyperedge_weights"}
COLLABORATION = {
    "drop_rate",
    "expert_coactivation",
    "collaboration_attention",
    "mediator_gate",
    "inference_knobs",
}
MEASURES = {"specialisation", "expert_similarity", "routing_information", "orthogonality"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "ghosts")


# Which plots a run has -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, missing",
    [
        ({}, set()),
        ({"records": 1}, OVER_TIME),
        ({"ghosts": 0}, {"ghost_timeline"}),
        ({"coupling": "gnn"}, HYPEREDGES),
        ({"coupling": "none"}, {"expert_connections"} | OVER_TIME | HYPEREDGES),
        ({"measures": False}, MEASURES),
        ({"collaboration": False}, COLLABORATION),
    ],
)
def test_a_run_has_the_plots_that_fit_it(tmp_path: Path, options: dict, missing: set[str]):
    record = read(write_run(tmp_path / "run", **options))
    assert list(analysis.plots(record)) == [name for name in ALL if name not in missing]


def test_a_dense_or_empty_run_offers_no_expert_plots(tmp_path: Path):
    dense = read(
        write_run(
            tmp_path / "dense", primaries=1, ghosts=0, coupling="none", measures=False, collaboration=False
        )
    )
    assert list(analysis.plots(dense)) == ["training_curves"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("k: 1\n")
    assert analysis.plots(read(tmp_path / "empty")) == {}


def test_many_layers_get_a_sample_of_panels(tmp_path: Path):
    record = read(write_run(tmp_path / "run", layers=40, records=2, ghosts=0, coupling="none"))
    figure = analysis.plots(record)["expert_load_over_time"](record)
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 24 and titles[0].startswith("layer 0 ") and titles[-1].startswith("layer 39 ")


def test_the_style_of_the_caller_neither_leaks_in_nor_is_changed(run: Path):
    record = read(run)
    plain = Report(record)._png("expert_load")
    with matplotlib.rc_context({"text.color": "red", "xtick.labelsize": 30, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        figure = analysis.plots(record)["expert_load"](record)
        assert dict(matplotlib.rcParams) == before
        assert {label.get_fontsize() for label in figure.axes[0].get_xticklabels()} == {8.0}
        assert Report(record)._png("expert_load") == plain


# What the plots say ----------------------------------------------------------------------------


def test_training_curves_name_units_and_the_baseline(run: Path):
    found = texts(analysis.plots(read(run))["training_curves"](read(run)))
    for text in (
        "cross-entropy, nats per token",
        "bits per byte",
        "unigram baseline 2.700",
        "tokens per second",
    ):
        assert text in found


def test_perplexity_stands_in_for_missing_bits_per_byte(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(
        '{"kind": "eval", "step": 5, "loss": 2.0, "perplexity": 7.4, "bits_per_byte": null}\n'
    )
    found = texts(analysis.plots(read(run))["training_curves"](read(run)))
    assert "perplexity per token" in found and "bits per byte" not in found and "Speed" not in found


def test_metric_takes_the_last_line_of_a_step_and_only_numbers(tmp_path: Path):
    run = write_run(tmp_path / "run")
    rows = [(3, 3.0), (1, 1.0), (3, 4.0), (5, None), (6, True), (7, float("inf")), (8, 10**400)]
    lines = [{"kind": "train", "step": step, "aux": {"balance": value}} for step, value in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, values = metric(read(run), "train", "aux/balance")
    assert steps.tolist() == [1, 3] and values.tolist() == [1.0, 4.0]
    assert len(metric(read(run), "eval", "aux/balance")[0]) == 0


def test_smooth_keeps_a_line_and_skips_what_is_not_finite():
    line = np.arange(20.0)
    assert np.allclose(smooth(line, 5)[2:-2], line[2:-2])
    line[7] = np.nan
    assert np.isfinite(smooth(line, 5)).all()
    assert np.isnan(smooth(np.full(3, np.nan), 2)).all()
    assert smooth(np.ones(3), 50).tolist() == [1.0, 1.0, 1.0]


def test_load_is_the_mean_of_the_last_quarter_in_per_cent(run: Path):
    record = read(run)
    figure = analysis.plots(record)["expert_load"](record)
    (shown,) = (values for values in cells(figure) if values.shape == (2, 6))
    expected = 100 * record.records["load"][-5:].mean(0)
    assert np.allclose(shown[:, :5], expected[:, :5], atol=1e-4)
    assert np.isnan(shown[:, 5]).all()  # ghost 1 never woke
    assert {"uniform share 20.0 %", "g0", "g1", "–"} <= set(texts(figure))


def test_max_violation_of_known_loads():
    share = np.array([[25.0, 25, 25, 25], [100, 0, 0, 0], [60, 40, np.nan, np.nan]])
    assert np.allclose(max_violation(share), [0, 3, 0.2])


def test_experts_are_live_by_phase_or_else_by_level(run: Path, tmp_path: Path):
    by_phase = live(read(run), 2)
    by_level = live(read(change(write_run(tmp_path / "run"), ghost_phase=None)), 2)
    assert (by_phase == by_level).all()
    assert by_phase[..., :4].all() and not by_phase[0, :, 4].any() and by_phase[-1, :, 4].all()
    assert not by_phase[..., 5].any()


def test_connections_are_the_recorded_coupling_without_sleepers(run: Path):
    record = read(run)
    figure = analysis.plots(record)["expert_connections"](record)
    coupling = record.records["coupling"][-1]
    for layer, shown in enumerate(values for values in cells(figure) if values.shape == (5, 5)):
        off = ~np.eye(5, dtype=bool)
        assert np.allclose(shown[off], coupling[layer, :5, :5][off])
        assert np.isnan(shown.diagonal()).all()
    found = texts(figure)
    assert {"listening expert", "speaking expert", "coupling strength", "layer 1"} <= set(found)
    assert "Expert connections (hyper coupling), step 400" in found
    assert any(text.endswith("left out, without any connection: g1") for text in found)


def test_self_connections_are_numbers_where_they_exist(tmp_path: Path):
    run = write_run(tmp_path / "run", ghosts=0)
    coupling = read(run).records["coupling"] + 0.5 * np.eye(4, dtype=np.float32)
    record = read(change(run, coupling=coupling))
    figure = analysis.plots(record)["expert_connections"](record)
    # As numbers only: on the colour scale they would leave nothing for the connections.
    assert np.isnan(cells(figure)[0].diagonal()).all()
    assert sum(text.startswith(".500") for text in texts(figure)) == 8


def test_change_is_counted_from_where_the_last_ghost_was_fully_there(run: Path):
    record = read(run)
    coupling, level = record.records["coupling"], record.records["ghost_level"][:, 0, 0]
    start = int(np.flatnonzero(level == 1)[0])
    assert settled(record).tolist() == [start, start] and 0 < start < 19
    figure = analysis.plots(record)["expert_connections_change"](record)
    shown = [values for values in cells(figure) if values.shape == (5, 5)]
    off = ~np.eye(5, dtype=bool)
    assert len(shown) == 2 and np.allclose(shown[1][off], (coupling[-1] - coupling[start])[1, :5, :5][off])
    assert f"layer 1, since step {record.records['step'][start]}" in texts(figure)


def test_change_without_ghosts_is_counted_from_the_first_record(tmp_path: Path):
    record = read(write_run(tmp_path / "run", ghosts=0))
    shown = cells(analysis.plots(record)["expert_connections_change"](record))[0]
    first, last = record.records["coupling"][[0, -1]]
    off = ~np.eye(4, dtype=bool)
    assert np.allclose(shown[off], (last - first)[0][off])


def test_hyperedges_are_named_by_their_members_strongest_first(run: Path):
    record = read(run)
    assert hyperedge_members(record, 15)[:6] == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [1, 2]]
    figure = analysis.plots(record)["hyperedge_weights"](record)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    weight = record.records["hyperedge_weight"][-1, 0]
    awake = [edge for edge, members in enumerate(hyperedge_members(record, 15)) if 5 not in members]
    strongest = max(awake, key=lambda edge: weight[edge])
    names = ["0", "1", "2", "3", "g0", "g1"]
    assert labels[0] == "·".join(names[expert] for expert in hyperedge_members(record, 15)[strongest])
    assert len(labels) == 10 and not any("g1" in label for label in labels)
    assert figure.axes[0].get_title() == "layer 0 · 5 of 15 dormant"


def test_many_hyperedges_are_shortened_in_the_middle(tmp_path: Path):
    record = read(write_run(tmp_path / "run", layers=1, primaries=8, ghosts=0))
    figure = analysis.plots(record)["hyperedge_weights"](record)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 17 and labels[8] == "… 12 …"
    (points,) = (item for item in figure.axes[0].collections if isinstance(item, PathCollection))
    weights = points.get_offsets()[:, 0].tolist()
    assert len(weights) == 16 and weights == sorted(weights, reverse=True)


def test_ghost_transitions_are_marked_with_their_steps(run: Path):
    record = read(run)
    changes = transitions(record.records["step"], record.records["ghost_phase"][:, 0])
    assert [(ghost, phase) for _, ghost, phase in changes] == [(0, 1), (0, 2)]
    found = texts(analysis.plots(record)["ghost_timeline"](record))
    assert {str(step) for step, _, _ in changes} <= set(found)
    assert {"threshold 0.01", "saturation", "dormant", "activating", "active", "g0", "g1"} <= set(found)
    assert "Ghost experts: 2 of 4 awake at step 400" in found
    assert "1e-3" in found  # saturation spans decades here, so its axis is logarithmic


# Damaged records -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, meta, records",
    [
        ("expert_load", {}, {"load": np.zeros((20, 2, 5), np.float32)}),
        ("expert_load", {}, {"load": np.zeros((19, 2, 6), np.float32)}),
        ("expert_load", {}, {"load": np.zeros((20, 6), np.float32)}),
        ("expert_load", {}, {"load": np.zeros((20, 2, 6), np.int64)}),
        ("expert_load", {}, {"ghost_phase": np.zeros((20, 3, 2), np.int64)}),
        ("expert_load", {"num_ghosts": "two"}, {}),
        ("expert_load", {"num_experts": "0"}, {}),
        ("expert_load", {}, {"step": np.zeros(20, np.float32)}),
        ("expert_connections", {}, {"coupling": np.zeros((20, 2, 6, 5), np.float32)}),
        ("hypergraph", {}, {"incidence": np.array([[0, 1], [0, 10**12]]), "hyperedge_weight": None}),
        ("hypergraph", {}, {"incidence": np.array([[0, 6], [0, 0]]), "hyperedge_weight": None}),
        ("training_curves", {}, {"ghost_learning_rate": np.zeros((20, 2, 3), np.float32)}),
        ("specialisation", {}, {"specialisation": np.zeros((20, 3), np.float32)}),
        ("specialisation", {}, {"final_specialisation": np.zeros(3, np.float32)}),
        ("expert_similarity", {}, {"final_cka": np.zeros((2, 6, 5), np.float32)}),
        ("routing_information", {}, {"final_routing_entropy_random": np.zeros((2, 1), np.float32)}),
        ("drop_rate", {}, {"drop_rate": np.zeros((20, 3), np.float32)}),
        ("drop_rate", {}, {"drop_rate_random": np.zeros((19, 2), np.float32)}),
        ("expert_coactivation", {}, {"final_coactivation": np.zeros((2, 5, 5), np.float32)}),
        ("expert_coactivation", {}, {"final_coactivation_random": np.zeros((2, 6), np.float32)}),
        ("collaboration_attention", {}, {"final_attention": np.zeros((2, 8, 8), np.float32)}),
        ("collaboration_attention", {}, {"final_attention": np.zeros((2, 6, 7), np.float32)}),
        ("collaboration_attention", {}, {"final_attention_uniform": np.zeros(3, np.float32)}),
        ("mediator_gate", {}, {"mediator_gate": np.zeros((20, 3), np.float32)}),
        ("mediator_gate", {}, {"final_mediator_gate": np.zeros((2, 1), np.float32)}),
        ("inference_knobs", {}, {"final_inference_loss": np.zeros((2, 3), np.float32)}),
        ("inference_knobs", {}, {"final_inference_steps": np.ones(2, np.float32)}),
        ("inference_knobs", {}, {"final_inference_trained": np.array([1, 2, 4])}),
        ("inference_knobs", {}, {"final_inference_trained": np.array([3, 2])}),
        ("orthogonality", {}, {"overlap": np.zeros((19, 2), np.float32)}),
        ("hyperedge_weights", {}, {"incidence": np.array([[0, 6], [0, 0]])}),
        ("hyperedge_weights", {}, {"incidence": np.array([[0, 1], [0, 15]])}),
        ("hyperedge_weights", {}, {"incidence": np.array([[0, -1], [0, 0]])}),
        ("hyperedge_weights", {}, {"incidence": np.zeros((3, 4), np.int64)}),
        ("ghost_timeline", {}, {"ghost_level": np.zeros((20, 2, 3), np.float32)}),
        ("ghost_timeline", {}, {"saturation": np.zeros((20, 3), np.float32)}),
        ("ghost_timeline", {}, {"ghost_phase": np.zeros((20, 1, 2), np.int64)}),
    ],
)
def test_records_that_do_not_fit_are_a_typed_error(tmp_path: Path, name: str, meta: dict, records: dict):
    run = change(write_run(tmp_path / "run"), meta, **records)
    with pytest.raises(CheckpointError, match=r"records\.safetensors") as caught:
        Report(read(run), name)[name]
    assert "\n" not in str(caught.value)


# The report ------------------------------------------------------------------------------------


def test_report_is_a_lazy_mapping_of_figures(run: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def picture(record) -> Figure:
        drawn.append(record.path)
        return Figure()

    monkeypatch.setitem(analysis.PLOTS, picture, lambda record: True)
    report = Report(read(run))
    assert list(report) == [*ALL, "picture"] and len(report) == len(ALL) + 1 and not drawn
    assert report["picture"] is report["picture"] and drawn == [run]
    assert repr(report).startswith("Report('ghosts', training_curves, ")
    with pytest.raises(KeyError):
        report["nonsense"]


def test_save_writes_one_png_a_plot_and_sees_later_edits(run: Path, tmp_path: Path):
    report = Report(read(run), ["expert_load", "expert_connections"])
    paths = report.save(tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["expert_load.png", "expert_connections.png"]
    first = [path.read_bytes() for path in paths]
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in first)
    report["expert_load"].suptitle("another title")
    report.save(tmp_path / "new" / "plots")
    assert paths[0].read_bytes() != first[0] and paths[1].read_bytes() == first[1]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_html_is_one_file_with_the_headline_beside_baseline_and_chance(run: Path, tmp_path: Path):
    report = Report(read(run), ["expert_load"])
    page = report.to_html(tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    row = re.search(r"<tr><th>bits per byte.*?</tr>", page, flags=re.S)[0]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == ["1.62", "2.7", "−40.0 %", "4.12"]
    for fact in ("1,234,567", "912.4", "stdlib", "2.13.0", "unigram baseline", "learning_rate"):
        assert fact in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert report._repr_html_().count("<img") == 1


def test_html_escapes_what_a_run_says(run: Path, tmp_path: Path):
    page = Report(read(run), []).to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "</script>" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;/script&gt;&lt;b&gt;bold" in page
    assert "return &#39;&lt;/pre&gt;&lt;i&gt;&#39;" in page


def test_titles_do_not_read_formulas_in_what_a_run_says(tmp_path: Path):
    run = change(write_run(tmp_path / "run"), {"coupling": HOSTILE, "hyperedge_strategy": "$\\frac{$\n"})
    report = Report(read(run), ["expert_connections", "hyperedge_weights"])
    assert len(report.save(tmp_path)) == 2


def test_an_unfinished_run_has_a_report(tmp_path: Path):
    run = write_run(tmp_path / "run", result=False)
    page = Report(read(run), "expert_load").to_html(tmp_path / "report.html").read_text()
    assert "no result yet" in page and "Sample" not in page


def test_unknown_plots_are_named_with_a_suggestion(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"did you mean 'expert_load'\?.*orthogonality; got 'expert_laod'"):
        Report(read(run), ["expert_laod"])
    plain = read(write_run(tmp_path / "run", ghosts=0))
    with pytest.raises(ConfigError, match="this run has no such plot"):
        Report(plain, "ghost_timeline")


# The command -----------------------------------------------------------------------------------


def test_command_writes_into_the_run_and_prints_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = write_run(tmp_path / "run")
    assert main([str(run), "--plots", "expert_load", "training_curves"]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        run / "plots" / "expert_load.png",
        run / "plots" / "training_curves.png",
        run / "report.html",
    ]
    assert all(path.stat().st_size > 5000 for path in printed)


def test_command_takes_a_step_and_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = write_run(tmp_path / "run")
    (run / "step-00000200").mkdir()
    before = sorted(run.rglob("*"))
    step, out = str(run / "step-00000200"), tmp_path / "out"
    assert main([step, "--out", str(out), "--plots", "expert_load"]) == 0
    assert (out / "report.html").is_file() and (out / "plots" / "expert_load.png").is_file()
    assert sorted(run.rglob("*")) == before
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing"], "not a run"),
        (["run", "--plots", "expert_laod"], "did you mean 'expert_load'"),
        (["run", "--plots", "expert_load", "--out", "file"], "file"),
        (["run", "--colour"], "unrecognized arguments: --colour"),
        ([], "arguments are required: run"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"
