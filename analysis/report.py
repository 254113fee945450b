"""The report of a run: its figures, its headline numbers, its configuration, in one HTML file."""

import base64
import difflib
import html
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

import analysis
from analysis.output import png, write
from analysis.series import is_number
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import ConfigError

FACTS = {
    "steps": "optimiser steps",
    "seconds": "seconds",
    "params_total": "parameters",
    "params_active": "parameters active per token",
    "flops_per_token": "FLOPs per token",
    "peak_rss_mb": "peak memory, MB",
    "dataset": "data set",
    "device": "device",
    "seed": "seed",
}


class Report(Mapping[str, Figure]):
    """The plots of one run, by name; each figure is drawn when it is first asked for.

    Args:
        record: The run, as :func:`graphmoe.checkpoint.read` returns it.
        plots: ``"all"``, the name of one plot, or several names.

    Raises:
        ConfigError: If a name is not a plot that fits the run.
    """

    def __init__(self, record: RunRecord, plots: str | Sequence[str] = "all"):
        self.record = record
        self._draw = _select(record, plots)
        self._figures: dict[str, Figure] = {}
        self._pngs: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> Figure:
        if name not in self._figures:
            self._figures[name] = self._draw[name](self.record)
        return self._figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draw)

    def __len__(self) -> int:
        return len(self._draw)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.record.path.absolute().name!r}, {', '.join(self)})"

    def save(self, directory: str | Path) -> list[Path]:
        """Write every figure as ``<directory>/<name>.png`` and return the paths.

        The folder is made if it is missing; a file of that name is replaced in one step.
        """
        paths = [Path(directory) / f"{name}.png" for name in self]
        for path in paths:
            write(path, self._png(path.stem))
        return paths

    def to_html(self, path: str | Path) -> Path:
        """Write the whole report as one self-contained HTML file and return its path."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        result = self.record.result or {}
        page = environment.get_template("report.html").render(
            name=self.record.path.absolute().name,
            recipe=result.get("recipe") or self.record.meta.get("recipe", ""),
            headline=_headline(result),
            baseline=_mapping(result.get("baseline")).get("name", ""),
            facts={label: _text(result[key]) for key, label in FACTS.items() if result.get(key) is not None},
            sample=_sample(self.record),
            figures=[(name, self._caption(name), self._base64(name)) for name in self],
            config=_exact(self.record.config),
            versions=_exact(_mapping(result.get("versions"))),
        )
        return write(Path(path), page.encode("utf-8", errors="replace"))

    def _repr_html_(self) -> str:
        return "\n".join(
            f'<img alt="{html.escape(self._caption(name))}" style="max-width: 100%" '
            f'src="data:image/png;base64,{self._base64(name)}">'
            for name in self
        )

    def _caption(self, name: str) -> str:
        return (inspect.getdoc(self._draw[name]) or name).splitlines()[0]

    def _base64(self, name: str) -> str:
        return base64.b64encode(self._png(name)).decode("ascii")

    def _png(self, name: str) -> bytes:
        figure = self[name]
        if name not in self._pngs or figure.stale:
            self._pngs[name] = png(figure)
        return self._pngs[name]


def _select(record: RunRecord, names: str | Sequence[str]) -> dict[str, "analysis.Plot"]:
    """Return the chosen ones of the plots that fit the run."""
    offered = analysis.plots(record)
    if names == "all":
        return offered
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in offered:
            close = difflib.get_close_matches(str(name), offered, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            expected = f"'all' or some of {', '.join(offered) or 'none: nothing is recorded'}"
            raise ConfigError(f"this run has no such plot{hint}", "plots", expected, name)
    return {name: offered[name] for name in chosen}


def _headline(result: dict) -> list[dict[str, str]]:
    """One row a metric: its value beside the baseline's and chance's."""
    metrics, baseline, chance = (_mapping(result.get(key)) for key in ("metrics", "baseline", "chance"))
    rows = []
    for name in dict.fromkeys([*metrics, *baseline, *chance]):
        value, reference = metrics.get(name), baseline.get(name)
        if name == "name" or isinstance(value, list | dict):  # a curve is a picture
            continue
        change = ""
        if is_number(value) and is_number(reference) and reference:
            change = f"{100 * (value / reference - 1):+.1f} %".replace("-", "−")
        rows.append(
            {
                "name": str(name).replace("_", " "),
                "unit": "nats per token" if name == "loss" and "perplexity" in metrics else "",
                "value": _text(value),
                "baseline": _text(reference),
                "change": change,
                "chance": _text(chance.get(name)),
            }
        )
    return rows


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    """Write a JSON value for people: thousands separated, four significant digits of a fraction."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:,.0f}" if 1_000 <= abs(value) < 1e15 else f"{value:.4g}"
    if is_number(value):
        return f"{value:,}"
    return json.dumps(value, default=str, ensure_ascii=False)


def _exact(settings: Mapping) -> dict[str, str]:
    """Settings as they would be typed: strings bare, everything else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        for key, value in settings.items()
    }


def _sample(record: RunRecord) -> dict[str, str] | None:
    """The last text that the model wrote: its prompt (may be empty) and the continuation."""
    found = [entry["sample"] for entry in [*record.metrics, record.result or {}] if entry.get("sample")]
    if not found:
        return None
    sample = found[-1]
    if not isinstance(sample, dict):
        return {"prompt": "", "continuation": _text(sample)}
    return {key: _text(sample.get(key, "")) for key in ("prompt", "continuation")}
