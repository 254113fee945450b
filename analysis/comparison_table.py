"""The table of a comparison, for people (Markdown) and for programs (CSV)."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from statistics import median

from analysis.groups import Group, Spread, dataset, differing, figure, paired, seed, spread
from analysis.series import is_number
from graphmoe.checkpoint import RunRecord

METRICS = {"accuracy": "accuracy", "bits_per_byte": "bits per byte", "loss": "loss, nats per token"}
"""What models are compared in: the first that every run has."""
MORE_IS_BETTER = {"accuracy"}
REFERENCES = {"baseline": "unigram", "majority": "majority class", "chance": "chance"}
"""Rows that are no model, by their key in the results, and what they are called if no run says it."""
EXTRAS = {
    "MaxVio of a step / even load / blind": (
        "step_max_violation",
        "batch_violation_even",
        "step_max_violation_random",
    ),
    "experts a token": ("edges_per_token",),
    "tokens nobody chose / blind": ("unserved", "unserved_random"),
    "dropped / random": ("drop_rate", "drop_rate_random"),
    "mediator gate": ("mediator_gate",),
    "edges kept": ("edges_kept",),
}
"""Columns of figures of experts that only some models have."""
DASH = "–"

Row = dict[str, str]


def metric_of(groups: Sequence[Group]) -> str:
    """Return the held-out figure to compare in: accuracy of classifiers; else bits per byte, or loss if a run
    has no bytes."""
    runs = [run for group in groups for run in group.runs]
    known = [key for key in METRICS if all(figure(run, "metrics", key) is not None for run in runs)]
    return known[0] if known else "loss"


def better(metric: str) -> str:
    """Return which values of a figure are better, ``more`` or ``less``."""
    return "more" if metric in MORE_IS_BETTER else "less"


def markdown_table(groups: Sequence[Group], baseline: str | None) -> str:
    """Return the table: one row a group, then what is no model of this library, and chance. A table of
    classifiers leaves out columns of which no row knows anything.

    Args:
        groups: What is compared.
        baseline: Label of the group that differences are taken to, or ``None``.
    """
    metric = metric_of(groups)
    rates = {_rates(group) for group in groups}
    extras = [
        title for title, names in EXTRAS.items() if any(group.spread("experts", names[0]) for group in groups)
    ]
    reference = next((group for group in groups if group.label == baseline), None)
    rows = [_row(group, metric, reference, extras, rates=len(rates) > 1) for group in groups]
    rows += references(groups, metric)
    columns = list(rows[0])
    if metric == "accuracy":
        columns = [column for column in columns if any(row.get(column, DASH) != DASH for row in rows)]
    lines = [columns, *([row.get(column, DASH) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    header, *body = [[_pad(row, widths, place) for place in range(len(columns))] for row in lines]
    note = "±: standard deviation over seeds; held-out data, means over layers; speed in training, median."
    if metric == "accuracy":
        note += " Held-out is the test part, on which nothing was chosen."
    if reference is not None:
        note += f" Against {_plain(reference.label)}: mean difference at equal seeds ± its standard error"
        note += f" (number of seeds); {'positive' if better(metric) == 'more' else 'negative'} is better."
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body)) + f"\n{note}\n"


def csv_table(groups: Sequence[Group]) -> str:
    """Return one row a run: what it is, the settings that differ, and every number of its result."""
    runs = [(group.label, run) for group in groups for run in group.runs]
    settings = differing([run.config for _, run in runs])
    rows = []
    for label, run in runs:
        row = {"name": label, "run": str(run.path), "dataset": dataset(run), "seed": seed(run)}
        row |= {f"config.{key}": _cell(run.config.get(key)) for key in settings}
        rows.append(row | dict(_numbers(run)))
    file = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(group: Group, metric: str, reference: Group | None, extras: Sequence[str], *, rates: bool) -> Row:
    row = {"name": _plain(group.label), "seeds": str(len(group.runs))}
    row[f"held-out {METRICS[metric]}"] = _with_spread(group.spread("metrics", metric))
    if reference is not None:
        difference = paired(group.values("metrics", metric), reference.values("metrics", metric))
        same = reference.label == group.label
        row[f"against {_plain(reference.label)}"] = "baseline" if same else _difference(difference)
    row["perplexity"] = _with_spread(group.spread("metrics", "perplexity"), ".2f")
    if rates:
        row["learning rate"] = _rates(group)
    speeds = list(group.values("metrics", "tokens_per_second").values())
    row["tokens/s"] = f"{median(speeds):,.0f}" if speeds else DASH
    seconds = group.spread("seconds")
    if metric == "accuracy" and seconds is not None:
        row["seconds"] = f"{seconds.mean:.0f}"
    parameters = ("params_active", "params_total")
    row["active / total parameters, M"] = _means(group, parameters, ".3f", scale=1e-6)
    flops = group.spread("flops_per_token")
    row["FLOPs per token, M"] = f"{flops.mean / 1e6:.2f}" if flops else DASH
    for name, title in (("specialisation", "specialisation / random"), ("cka", "CKA / random")):
        row[title] = _means(group, (name, f"{name}_random"), ".3f", inside="experts")
    for name, title, form in (("max_violation", "MaxVio", ".2f"), ("load_entropy", "load entropy", ".3f")):
        value = group.spread("experts", name)
        row[title] = format(value.mean, form) if value else DASH
    for title in extras:
        row[title] = _means(group, EXTRAS[title], ".3f", inside="experts")
    return row


def references(groups: Sequence[Group], metric: str) -> Iterator[Row]:
    """The rows of what is no model of this library, and of chance; seeds may differ in what they hold out."""
    runs = [run for group in groups for run in group.runs]
    for key, name in REFERENCES.items():
        by_seed = [{seed(run): figure(run, key, which) for run in runs} for which in (metric, "perplexity")]
        held_out, perplexity = (
            spread([value for value in values.values() if value is not None]) for values in by_seed
        )
        if held_out is None and perplexity is None:
            continue
        row = {"name": _name(runs, key) or name}
        row[f"held-out {METRICS[metric]}"] = f"{held_out.mean:.4f}" if held_out else DASH
        yield row | {"perplexity": f"{perplexity.mean:,.2f}" if perplexity else DASH}


def _name(runs: Sequence[RunRecord], key: str) -> str | None:
    """What the results call a reference, if they agree."""
    parts = [part for run in runs if isinstance(part := (run.result or {}).get(key), dict)]
    names = {str(part["name"]) for part in parts if part.get("name")}
    return _plain(names.pop()) if len(names) == 1 else None


def _with_spread(value: Spread | None, form: str = ".4f") -> str:
    """``1.6200 ± 0.0031``; of a single value the spread is a dash."""
    if value is None:
        return DASH
    return f"{value.mean:{form}} ± {DASH if value.spread is None else format(value.spread, form)}"


def _difference(value: Spread | None) -> str:
    """``−0.0120 ± 0.0031 (3)``: mean, standard error, number of seeds that both have."""
    if value is None:
        return DASH
    error = DASH if value.spread is None else f"{value.spread:.4f}"
    return f"{value.mean:+.4f} ± {error} ({value.count})".replace("-", "−")


def _means(
    group: Group, names: Sequence[str], form: str, *, inside: str | None = None, scale: float = 1.0
) -> str:
    """Means of a group with slashes between them."""
    paths = [(inside, name) if inside else (name,) for name in names]
    found = [group.spread(*path) for path in paths]
    if not any(found):
        return DASH
    return " / ".join(format(scale * value.mean, form) if value else DASH for value in found)


def _rates(group: Group) -> str:
    """The learning rates of a group, as they were given."""
    rates = dict.fromkeys(run.config.get("learning_rate") for run in group.runs)
    return ", ".join(f"{rate:g}" if is_number(rate) else DASH for rate in rates)


def _numbers(run: RunRecord) -> Iterator[tuple[str, float]]:
    """Every number of a run's result, under keys such as ``experts.cka.0``."""

    def walk(value: object, path: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                yield from walk(inner, f"{path}.{place}")
        elif is_number(value) and path != "seed":
            yield path, value

    return walk(run.result, "")


def _cell(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=str)


def _plain(text: str) -> str:
    """A name as one line without the bar that ends a cell."""
    return "".join(char if char.isprintable() else " " for char in text).replace("|", "/")


def _pad(row: list[str], widths: list[int], place: int) -> str:
    """A cell as wide as its column; names are to the left and figures to the right."""
    return row[place].rjust(widths[place]) if place else row[place].ljust(widths[place])
