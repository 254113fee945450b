"""Groups of runs that differ only in their seed, and the figures that such a group has in common."""

import json
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from analysis.series import is_number
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError, ConfigError

PLACE = ("run_name", "out_dir", "resume", "overwrite", "evaluate")
"""Settings that say where a run lies and how it was started, not what it is."""


class Spread(NamedTuple):
    """A mean over ``count`` values and their standard deviation (or the standard error of the mean).

    ``spread`` is ``None`` for a single value: nothing is known about how it varies.
    """

    mean: float
    spread: float | None
    count: int


class Group(NamedTuple):
    """Runs of one configuration, a run a seed, in the order of the seeds."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> list[int]:
        return [seed(run) for run in self.runs]

    def values(self, *path: str) -> dict[int, float]:
        """Return one figure of ``result.json`` by seed, for the runs that have it.

        Args:
            path: Keys from the outside in, such as ``"metrics", "loss"``. Of a list with a number a
                layer the mean is taken.
        """
        found = {seed(run): figure(run, *path) for run in self.runs}
        return {key: value for key, value in found.items() if value is not None}

    def spread(self, *path: str) -> Spread | None:
        """Return mean and standard deviation of a figure over seeds, ``None`` if no run has it."""
        return spread(list(self.values(*path).values()))


def group_runs(records: Sequence[RunRecord], labels: Sequence[str] | None = None) -> list[Group]:
    """Put runs that differ only in their seed, and in where they lie, into groups.

    Args:
        records: Finished runs on one data set.
        labels: The group of each run by name; without it runs with equal settings make a group, and
            it is named by what tells the groups apart.

    Returns:
        The groups, in the order in which the runs were given.

    Raises:
        CheckpointError: If a run has no result.
        ConfigError: If there is no run, if runs were made on different data sets, if two runs of a
            group have the same seed, or if there is not one label a run.
    """
    _check(records)
    if labels is None:
        keys = [_settings(record) for record in records]
    elif len(labels) == len(records):
        keys = [str(label) for label in labels]
    else:
        raise ConfigError("not one label a run", "labels", f"{len(records)} labels", len(labels))
    found: dict[str, list[RunRecord]] = {}
    for key, record in zip(keys, records, strict=True):
        found.setdefault(key, []).append(record)
    runs = [tuple(sorted(group, key=seed)) for group in found.values()]
    names = list(found) if labels is not None else _labels([group[0] for group in runs])
    groups = [Group(name, group) for name, group in zip(names, runs, strict=True)]
    for group in groups:
        _check_seeds(group)
    return groups


def differing(configs: Sequence[dict]) -> list[str]:
    """Return the settings that are not equal in all of ``configs``, seed and place aside."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in (*PLACE, "seed"))
    return [key for key in keys if len({_exact(config.get(key)) for config in configs}) > 1]


def figure(record: RunRecord, *path: str) -> float | None:
    """Return one number of a run's result, of a list the mean of its numbers; ``None`` without any."""
    value: object = record.result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    known = [float(item) for item in (value if isinstance(value, list) else [value]) if is_number(item)]
    return fmean(known) if known else None


def seed(record: RunRecord) -> int:
    """Return the seed of a run; 0 where none was written down."""
    value = record.config.get("seed", (record.result or {}).get("seed"))
    return value if isinstance(value, int) else 0


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and sample standard deviation of ``values``, ``None`` if there are none."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(values: dict[int, float], baseline: dict[int, float]) -> Spread | None:
    """Return the mean difference at equal seeds and its standard error; seeds of one side do not count."""
    difference = spread([values[key] - baseline[key] for key in values if key in baseline])
    if difference is None or difference.spread is None:
        return difference
    return difference._replace(spread=difference.spread / math.sqrt(difference.count))


def dataset(record: RunRecord) -> str:
    """Return the name of the data set a run was made on."""
    return str((record.result or {}).get("dataset") or record.config.get("dataset", ""))


def _check(records: Sequence[RunRecord]) -> None:
    if not records:
        raise ConfigError("there is nothing to compare", "runs", "at least one run")
    for record in records:
        if not isinstance(record.result, dict):
            raise CheckpointError("this run is not finished", record.path, "a folder with result.json")
    sets = {dataset(record): record.path for record in reversed(records)}
    if len(sets) > 1:
        named = ", ".join(f"{name} ({path})" for name, path in reversed(sets.items()))
        raise ConfigError("these runs cannot be compared", "dataset", "one data set", named)


def _check_seeds(group: Group) -> None:
    for first, second in zip(group.runs, group.runs[1:], strict=False):
        if seed(first) == seed(second):
            paths = f"{first.path} and {second.path}"
            raise ConfigError(f"two runs of '{group.label}' have the same seed", "seed", got=paths)


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Name each group, given by its first run, as briefly as tells them apart."""
    recipes = [str(record.config.get("recipe") or (record.result or {}).get("recipe")) for record in records]
    modes = [record.config.get("architecture_mode") for record in records]
    words = [str(mode or recipe) for mode, recipe in zip(modes, recipes, strict=True)]
    for candidates in (words, recipes):
        if len(set(candidates)) == len(records):
            return candidates
    labels = []
    for word, record in zip(words, records, strict=True):
        alike = [other.config for other, name in zip(records, words, strict=True) if name == word]
        named = [f"{key}={record.config.get(key)}" for key in differing(alike)]
        labels.append(" · ".join([word, *([", ".join(named)] if named else [])]))
    return labels


def _settings(record: RunRecord) -> str:
    """What has to be equal for two runs to be repetitions of each other."""
    settings = {key: value for key, value in record.config.items() if key not in (*PLACE, "seed")}
    # A setting that a recipe does not have yet is the same as one that was not given.
    return _exact({key: value for key, value in settings.items() if value is not None})


def _exact(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
