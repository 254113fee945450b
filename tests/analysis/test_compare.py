"""Comparison of finished runs: who belongs together, what the table and the picture say, what is refused."""

import csv
import io
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_run import texts, write_arm, write_run
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.compare import Comparison, compare, main
from analysis.comparison_figure import held_out
from analysis.groups import paired, spread
from analysis.trade_off import frontier, points_of, trade_off
from graphmoe.checkpoint import RunRecord, read
from graphmoe.errors import CheckpointError, ConfigError

BITS = {
    "moe": {0: 1.90, 1: 1.94, 2: 1.92},
    "ghost": {0: 1.85, 1: 1.92, 3: 1.70},
    "dense": {2: 2.01},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Arms whose seeds overlap in part, in an order that no table should depend on."""
    path = tmp_path_factory.mktemp("arms")
    runs = [(mode, seed, bits) for mode, arm in BITS.items() for seed, bits in arm.items()]
    return [
        read(write_arm(path / f"{mode}{seed}", mode=mode, seed=seed, bits=bits))
        for mode, seed, bits in reversed(runs)
    ]


def rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """The cells of the Markdown table by row and column."""
    lines = [line for line in comparison.markdown().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # aligned for the terminal
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}


def edit_result(run: Path, **changes: object) -> Path:
    """Replace entries of a run's result."""
    result = json.loads((run / "result.json").read_text()) | changes
    (run / "result.json").write_text(json.dumps(result))
    return run


# Groups ----------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_place_make_a_group(records: list[RunRecord]):
    groups = compare(records).groups
    assert [(group.label, group.seeds) for group in groups] == [
        ("dense", [2]),
        ("ghost", [0, 1, 3]),
        ("moe", [0, 1, 2]),
    ]
    assert [run.path.name for run in groups[1].runs] == ["ghost0", "ghost1", "ghost3"]


@pytest.mark.parametrize(
    "key, value, groups",
    [
        ("run_name", "elsewhere", 1),
        ("out_dir", "/there", 1),
        ("resume", True, 1),
        ("overwrite", True, 1),
        ("evaluate", "run", 1),
        ("weight_decay", None, 1),  # a setting that older runs do not have
        ("weight_decay", 0.2, 2),
        ("betas", [0.9, 0.99], 2),
    ],
)
def test_where_a_run_lies_does_not_tell_groups_apart(tmp_path: Path, key: str, value: object, groups: int):
    first, second = write_arm(tmp_path / "a"), write_arm(tmp_path / "b", seed=1)
    config = yaml.safe_load((second / "config.yaml").read_text()) | {key: value}
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(compare([read(first), read(second)]).groups) == groups


@pytest.mark.parametrize(
    "arms, labels",
    [
        ([{"mode": "moe"}, {"mode": "ghost", "num_ghosts": 2}], ["moe", "ghost"]),
        ([{"mode": None, "recipe": "moe_lm"}, {"mode": None, "recipe": "dense_lm"}], ["moe_lm", "dense_lm"]),
        ([{"mode": None, "recipe": "moe_lm"}, {"mode": "moe"}], ["moe_lm", "moe"]),
        (
            [{"mode": "moe", "k": 1}, {"mode": "moe", "k": 2}, {"mode": "ghost", "k": 2}],
            ["moe · k=1", "moe · k=2", "ghost"],
        ),
        (
            [{"mode": None, "a": "x", "k": 1}, {"mode": None, "k": 2}],
            ["coupled_lm · a=x, k=1", "coupled_lm · a=None, k=2"],
        ),
        ([{"mode": "moe", "k": 1}], ["moe"]),
    ],
)
def test_labels_are_as_short_as_tells_groups_apart(tmp_path: Path, arms: list[dict], labels: list[str]):
    runs = [read(write_arm(tmp_path / str(index), **arm)) for index, arm in enumerate(arms)]
    assert [group.label for group in compare(runs).groups] == labels


def test_given_labels_decide(tmp_path: Path):
    arms = [{"k": 1}, {"k": 2, "seed": 1}, {"k": 2, "seed": 0}]
    runs = [read(write_arm(tmp_path / str(index), **arm)) for index, arm in enumerate(arms)]
    groups = compare(runs, labels=["few", "few", "many"], baseline="many").groups
    assert [(group.label, group.seeds) for group in groups] == [("few", [0, 1]), ("many", [0])]
    with pytest.raises(ConfigError, match="labels: not one label a run; expected 3 labels; got 2"):
        compare(runs, labels=["few", "many"])


# The table -------------------------------------------------------------------------------------


def test_means_and_deviations_are_over_seeds(records: list[RunRecord]):
    table = rows(compare(records))
    moe = list(BITS["moe"].values())
    assert table["moe"]["seeds"] == "3"
    expected = f"{statistics.mean(moe):.4f} ± {statistics.stdev(moe):.4f}"
    assert table["moe"]["held-out bits per byte"] == expected
    perplexities = [math.exp(2.3 * value) for value in moe]
    expected = f"{statistics.mean(perplexities):.2f} ± {statistics.stdev(perplexities):.2f}"
    assert table["moe"]["perplexity"] == expected


def test_differences_are_taken_at_equal_seeds(records: list[RunRecord]):
    table = rows(compare(records))
    shared = [BITS["ghost"][seed] - BITS["moe"][seed] for seed in (0, 1)]
    error = statistics.stdev(shared) / math.sqrt(2)
    expected = f"{statistics.mean(shared):+.4f} ± {error:.4f} (2)".replace("-", "−")
    assert table["ghost"]["against moe"] == expected
    # The seed that only one of them has would turn the sign of the difference of means.
    assert table["dense"]["against moe"] == "+0.0900 ± – (1)"
    assert table["moe"]["against moe"] == "baseline" and table["unigram"]["against moe"] == "–"


def test_paired_by_hand():
    assert paired({0: 3.0, 1: 5.0, 9: 7.0}, {0: 1.0, 1: 1.0, 5: 0.0}) == (3.0, math.sqrt(2) / math.sqrt(2), 2)
    assert paired({0: 3.0}, {1: 1.0}) is None
    assert paired({0: 3.0}, {0: 1.0}) == (2.0, None, 1)
    assert spread([]) is None and spread([2.0]) == (2.0, None, 1)


def test_a_single_seed_has_no_spread_and_never_zero(records: list[RunRecord]):
    dense = rows(compare(records))["dense"]
    assert dense["held-out bits per byte"] == "2.0100 ± –"
    assert dense["perplexity"].endswith(" ± –")


def test_other_columns_and_rows(records: list[RunRecord]):
    table = rows(compare(records))
    assert (
        table["moe"]
        | {
            "tokens/s": "9,001",  # the median of three
            "active / total parameters, M": "0.935 / 1.235",
            "FLOPs per token, M": "3.21",
            "specialisation / random": "0.600 / 0.800",
            "CKA / random": "0.200 / 0.050",
            "MaxVio": "0.30",
            "load entropy": "0.940",
        }
        == table["moe"]
    )
    assert "learning rate" not in table["moe"]
    assert list(table) == ["dense", "ghost", "moe", "unigram", "chance"]
    assert table["unigram"]["held-out bits per byte"] == "2.7000" and table["unigram"]["seeds"] == "–"
    assert table["chance"]["perplexity"] == "4,096.00"


def test_learning_rates_are_shown_where_groups_differ(tmp_path: Path):
    runs = [
        read(write_arm(tmp_path / str(rate), mode=mode, learning_rate=rate))
        for mode, rate in (("moe", 0.001), ("ghost", 0.002))
    ]
    table = rows(compare(runs))
    assert (table["moe"]["learning rate"], table["ghost"]["learning rate"]) == ("0.001", "0.002")


def test_what_a_result_lacks_is_a_dash(tmp_path: Path):
    run = edit_result(write_arm(tmp_path / "run"), experts={}, flops_per_token=None, chance=None, baseline=3)
    run = edit_result(run, metrics={"loss": 4.0, "bits_per_byte": 1.9}, params_active=None)
    table = rows(compare([read(run)]))
    assert list(table) == ["moe"]
    dashes = ("perplexity", "tokens/s", "FLOPs per token, M", "specialisation / random", "MaxVio")
    assert {table["moe"][name] for name in dashes} == {"–"}
    assert table["moe"]["active / total parameters, M"] == "– / 1.235"


def test_loss_is_compared_where_there_are_no_bytes(tmp_path: Path):
    runs = [write_arm(tmp_path / "a", bits=None), write_arm(tmp_path / "b", bits=2.0, seed=1)]
    comparison = compare([read(run) for run in runs])
    assert rows(comparison)["moe"]["held-out loss, nats per token"].startswith("4.3000 ± ")
    assert comparison.figure().axes[0].get_ylabel() == "held-out loss, nats per token"


def test_a_perfect_score_of_zero_is_a_score(tmp_path: Path):
    table = rows(compare([read(write_arm(tmp_path / "run", bits=0.0))]))
    assert table["moe"]["held-out bits per byte"] == "0.0000 ± –"


def test_csv_has_a_row_a_run_and_exact_numbers(records: list[RunRecord]):
    table = list(csv.DictReader(io.StringIO(compare(records).csv())))
    assert len(table) == 7
    row = next(row for row in table if row["name"] == "ghost" and row["seed"] == "3")
    assert float(row["metrics.bits_per_byte"]) == 1.70 and Path(row["run"]).name == "ghost3"
    assert float(row["metrics.loss"]) == 2.3 * 1.70 and row["config.architecture_mode"] == "ghost"
    assert (row["experts.cka.0"], row["experts.cka.1"]) == ("0.3", "0.1")
    assert float(row["baseline.bits_per_byte"]) == 2.7 and row["dataset"] == "stdlib"


def test_csv_of_runs_with_different_figures_leaves_cells_empty(tmp_path: Path):
    runs = [write_arm(tmp_path / "a"), edit_result(write_arm(tmp_path / "b", seed=1), experts=None, extra=1)]
    first, second = csv.DictReader(io.StringIO(compare([read(run) for run in runs]).csv()))
    assert first["extra"] == "" and second["extra"] == "1" and second["experts.cka.0"] == ""


def test_names_cannot_break_the_table(tmp_path: Path):
    table = compare([read(write_arm(tmp_path / "run", mode="a|b\nc"))])
    assert list(rows(table)) == ["a/b c", "unigram", "chance"]


# The picture -----------------------------------------------------------------------------------


def test_curves_are_means_with_a_band_only_where_there_are_several_seeds(records: list[RunRecord]):
    comparison = compare(records)
    curves = comparison.figure().axes[0]
    dense, ghost, moe = curves.lines
    assert [line.get_label() for line in (dense, ghost, moe)] == ["dense", "ghost", "moe"]
    assert moe.get_xdata().tolist() == [40, 80, 120, 160, 200]
    values = np.array(list(BITS["moe"].values()))
    assert np.allclose(moe.get_ydata(), values.mean() * (1 + 40 / moe.get_xdata()))
    bands = [item for item in curves.collections if isinstance(item, PolyCollection)]
    assert len(bands) == 2
    heights = bands[1].get_paths()[0].vertices[:, 1]
    assert np.isclose(heights.max(), 2 * (values.mean() + values.std(ddof=1)))
    assert np.isclose(heights.min(), 1.2 * (values.mean() - values.std(ddof=1)))


def test_every_seed_is_a_dot(records: list[RunRecord]):
    finals = compare(records).figure().axes[1]
    dots = [item.get_offsets() for item in finals.collections if isinstance(item, PathCollection)]
    assert [sorted(points[:, 0].tolist()) for points in dots] == [
        [2.01],
        [1.70, 1.85, 1.92],
        [1.90, 1.92, 1.94],
    ]
    assert [label.get_text() for label in finals.get_yticklabels()] == ["dense", "ghost", "moe"]
    assert {text.get_text() for text in finals.texts} == {"2.0100", "1.8233", "1.9200"}


def test_steps_that_a_seed_lacks_are_left_out(tmp_path: Path):
    runs = [write_arm(tmp_path / str(seed), seed=seed) for seed in range(2)]
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(lines[1:4]))
    (group,) = compare([read(run) for run in runs]).groups
    at, values = held_out(group, "bits_per_byte")
    assert at.tolist() == [80, 120, 160] and values.shape == (2, 3)
    (runs[1] / "metrics.jsonl").unlink()
    comparison = compare([read(run) for run in runs])
    assert not comparison.figure().axes[0].lines


@pytest.mark.filterwarnings("error")
def test_long_names_and_many_groups_are_not_clipped(tmp_path: Path):
    runs = [
        read(
            write_arm(tmp_path / f"{k}-{seed}", hyperedge_strategy="all_triplets", k=k, dim=8 * k, seed=seed)
        )
        for k in range(1, 12)
        for seed in range(2)
    ]
    figure = compare(runs).figure()
    figure.draw_without_rendering()
    (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01
    labels = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == 11 and not any(a.overlaps(b) for a, b in pairwise(labels))


# Quality against cost --------------------------------------------------------------------------


def with_costs(path: Path, arms: dict[str, tuple[float, list[float]]]) -> list[RunRecord]:
    """Runs by label: FLOPs of a token, and the bits per byte of each seed."""
    return [
        read(
            edit_result(
                write_arm(path / f"{mode}{seed}", mode=mode, seed=seed, bits=value), flops_per_token=flops
            )
        )
        for mode, (flops, bits) in arms.items()
        for seed, value in enumerate(bits)
    ]


COSTS = {
    "dense": (3.0e6, [2.00, 2.02]),
    "moe": (3.1e6, [1.95, 1.97]),
    "moc": (4.0e6, [1.90, 1.94]),
    "wide": (5.0e6, [1.98]),
    "gnn": (3.1e6, [1.99, 2.01]),
}


def test_each_group_is_a_point_with_its_spread(tmp_path: Path):
    comparison = compare(with_costs(tmp_path, COSTS))
    figure = comparison.trade_off()
    (ax,) = figure.axes
    bars = [item for item in ax.containers if isinstance(item, ErrorbarContainer)]
    points = {tuple(np.round(np.ravel(bar.lines[0].get_xydata()), 6)) for bar in bars}
    assert points == {(3.0e6, 2.01), (3.1e6, 1.96), (4.0e6, 1.92), (5.0e6, 1.98), (3.1e6, 2.0)}
    (moc,) = (bar for bar in bars if bar.lines[0].get_xdata()[0] == 4.0e6)
    deviation = statistics.stdev([1.90, 1.94])
    assert np.allclose(moc.lines[2][0].get_segments()[0][:, 1], [1.92 - deviation, 1.92 + deviation])
    assert [bar.lines[0].get_marker() for bar in bars] == ["D", "D", "o", "o", "o"]
    assert ax.get_xscale() == "log"
    found = texts(figure)
    assert {"dense", "moe", "moc", "wide", "gnn"} <= set(found)
    ticks = dict(zip(ax.get_xticks(), (text.get_text() for text in ax.get_xticklabels()), strict=True))
    shown = {place: text for place, text in ticks.items() if 3e6 <= place <= 5e6}
    assert len(shown) >= 4
    assert all(math.isclose(float(text) * 1e6, place) for place, text in shown.items())  # millions
    assert "off the scale: unigram 2.7000, chance 4.1000" in found
    bold = {text.get_text() for text in ax.texts if text.get_fontweight() == "bold"}
    assert bold == {"dense", "moe"}


def test_the_frontier_is_what_nobody_beats_for_less(tmp_path: Path):
    groups = compare(with_costs(tmp_path, COSTS)).groups
    assert [point.group.label for point in frontier(points_of(groups))] == ["dense", "moe", "moc"]
    (line,) = (line for line in trade_off(groups).axes[0].lines if len(line.get_xdata()) == 6)
    expected = [(3e6, 2.01), (3.1e6, 2.01), (3.1e6, 1.96), (4e6, 1.96), (4e6, 1.92), (4e7, 1.92)]
    assert np.allclose(line.get_xydata(), expected)


def test_groups_without_a_cost_are_counted_and_without_any_there_is_no_picture(tmp_path: Path):
    runs = with_costs(tmp_path, {"moe": (3e6, [1.9]), "ghost": (None, [1.8])})
    comparison = compare(runs)
    assert "1 of 2 groups without FLOPs or score" in " ".join(texts(comparison.trade_off()))
    paths = compare([runs[1]]).save(tmp_path / "out")
    assert [path.name for path in paths] == ["comparison.md", "comparison.csv", "comparison.png"]


def boxes(figure: Figure) -> list[Bbox]:
    """Where the names of points are: without the lines that join them to their points."""
    figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in figure.axes[0].texts]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("groups, named", [(9, "moc · top_k=2"), (30, "3")])
def test_names_of_points_meet_neither_one_another_nor_a_point(tmp_path: Path, groups: int, named: str):
    random = np.random.default_rng(0)
    runs = []
    for k in range(groups):  # the first two lie apart, all others close together
        run = write_arm(
            tmp_path / str(k), mode="moc", top_k=k, bits=1.9 + 0.1 * (k == 0) + 0.02 * random.random()
        )
        runs.append(read(edit_result(run, flops_per_token=3e6 * (1 + (k == 1) + 0.3 * random.random()))))
    figure = compare(runs).trade_off()
    ax, names = figure.axes[0], boxes(figure)
    assert named in [text.get_text().replace("\n", " · ") for text in ax.texts] and len(names) == groups
    points = [
        ax.transData.transform((point.flops, point.quality.mean)) for point in points_of(compare(runs).groups)
    ]
    for index, box in enumerate(names):
        assert not any(box.overlaps(other) for other in names[index + 1 :])
        assert not any(box.contains(*point) for point in points)
        assert ax.get_window_extent().padded(2).fully_containsx(box.x0)
    (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01
    if groups == 30:  # numbers, and a key
        assert "3  moc · top_k=2" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_figures_that_only_some_models_have_get_columns(tmp_path: Path, records: list[RunRecord]):
    assert not {"dropped / random", "mediator gate"} & set(rows(compare(records))["moe"])
    experts = {"drop_rate": [0.1, 0.05], "drop_rate_random": [0.02, 0.02], "mediator_gate": [0.4, 0.3]}
    moc = read(edit_result(write_arm(tmp_path / "moc", mode="moc"), experts=experts))
    table = rows(compare([*records, moc]))
    assert table["moc"]["dropped / random"] == "0.075 / 0.020" and table["moc"]["mediator gate"] == "0.350"
    assert table["moe"]["dropped / random"] == "–"


# What is refused -------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, records: list[RunRecord]):
    with pytest.raises(ConfigError, match="nothing to compare; expected at least one run"):
        compare([])
    unfinished = read(write_run(tmp_path / "unfinished", layers=1, records=2, result=False))
    with pytest.raises(CheckpointError, match=r"unfinished: this run is not finished.*result\.json"):
        compare([*records, unfinished])
    with pytest.raises(ConfigError, match=r"baseline: .*expected dense, ghost, moe; got 'mole'"):
        compare(records, baseline="mole")
    other = read(write_arm(tmp_path / "other", dataset="wikitext-2", seed=7))
    with pytest.raises(ConfigError, match=r"dataset: .*stdlib \(.*dense2\), wikitext-2 \(.*other\)"):
        compare([*records, other])
    with pytest.raises(ConfigError, match=r"two runs of 'moe' have the same seed.*moe0 and .*moe0"):
        compare([*records, records[-1]])


# The command -----------------------------------------------------------------------------------


def test_command_prints_and_writes_the_table(
    tmp_path: Path, records: list[RunRecord], capsys: pytest.CaptureFixture
):
    out, runs = tmp_path / "new" / "out", [str(record.path) for record in records]
    assert main([*runs, "--out", str(out), "--baseline", "dense"]) == 0
    printed, comparison = capsys.readouterr().out, compare(records, baseline="dense")
    assert printed.startswith(comparison.markdown()) and "against dense" in printed
    names = ["comparison.md", "comparison.csv", "comparison.png", "trade_off.png"]
    assert printed.splitlines()[-4:] == [str(out / name) for name in names]
    assert (out / "comparison.md").read_text() == comparison.markdown()
    assert (out / "comparison.csv").read_text() == comparison.csv()
    for name in names[2:]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "at least one run"),
        (["missing"], "not a run"),
        (["arm", "--baseline", "ghost"], "expected moe; got 'ghost'"),
        (["arm", "--out", "file"], "file"),
        (["arm", "--base", "moe"], "unrecognized arguments: --base"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_arm(tmp_path / "arm")
    (tmp_path / "file").write_text("in the way")
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err and err.count("\n") == 1


# Classifiers -----------------------------------------------------------------------------------


def classifiers(tmp_path: Path) -> list[RunRecord]:
    """Arms of which more accuracy is better, and which know nothing of perplexity."""
    found = []
    arms = {"dense": ([0.70, 0.72], 2e6, {}), "choice": ([0.75, 0.73], 3e6, {"unserved": [0.01, 0.03]})}
    for mode, (values, flops, experts) in arms.items():
        for seed, value in enumerate(values):
            run = write_arm(tmp_path / f"{mode}{seed}", mode=mode, seed=seed)
            result = json.loads((run / "result.json").read_text())
            result |= {"metrics": {"accuracy": value, "loss": 1 - value}, "flops_per_token": flops}
            result |= {"baseline": {"name": "TF-IDF", "accuracy": 0.8}, "chance": {"accuracy": 0.5}}
            result |= {
                "majority": {"name": "majority class", "accuracy": 0.6},
                "experts": experts,
                "seconds": 7,
            }
            (run / "result.json").write_text(json.dumps(result))
            lines = [{"kind": "eval", "step": step, "accuracy": value * step / 200} for step in (100, 200)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            found.append(read(run))
    return found


def test_of_classifiers_more_accuracy_is_better(tmp_path: Path):
    comparison = compare(classifiers(tmp_path), baseline="dense")
    table = rows(comparison)
    assert list(table) == ["dense", "choice", "TF-IDF", "majority class", "chance"]
    assert table["choice"]["held-out accuracy"] == "0.7400 ± 0.0141"
    assert table["choice"]["against dense"] == "+0.0300 ± 0.0200 (2)"
    assert (
        table["TF-IDF"]["held-out accuracy"] == "0.8000" and table["chance"]["held-out accuracy"] == "0.5000"
    )
    assert table["choice"]["tokens nobody chose / blind"] == "0.020 / –"
    assert table["dense"]["seconds"] == "7"
    assert "perplexity" not in table["dense"] and "positive is better" in comparison.markdown()
    assert [ax.get_ylabel() or ax.get_xlabel() for ax in comparison.figure().axes] == [
        "validation accuracy",
        "held-out accuracy",
    ]
    # The dearer one stands on the frontier because it is more accurate, not less.
    assert [point.group.label for point in frontier(points_of(comparison.groups))] == ["dense", "choice"]
    assert comparison.trade_off().axes[0].get_ylabel() == "held-out accuracy (more is better)"
    worse = [
        point._replace(flops=point.flops * 10, quality=spread([0.6]))
        for point in points_of(comparison.groups)
    ]
    assert len(frontier([*points_of(comparison.groups), *worse])) == 2
