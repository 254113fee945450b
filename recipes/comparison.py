"""Several models on the same data: equal cost, equal tuning, seeds, one table."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from analysis.compare import compare
from graphmoe import checkpoint
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.models.cost import forward_flops
from graphmoe.train.config import RunConfig, changed, from_run, open_run, to_yaml
from graphmoe.train.ranks import launched_processes
from recipes import language_model
from recipes.language_model_config import build_model
from recipes.reporting import say

TUNING = "tuning.json"
Arms = Mapping[str, RunConfig]


@dataclasses.dataclass(frozen=True)
class Task:
    """What the models of a comparison do; data is whatever ``read`` returns, with ``describe()``.

    Attributes:
        read: ``config -> data``.
        divide: ``(data, tuning) -> parts``: what training gets, where ``tuning`` says whether some of the
            data has to be kept for choosing learning rates.
        train: ``(config, recipe, parts) -> result``, what stands in ``result.json``. If ``tuning`` was true,
            the least ``result["validation"]["loss"]`` chooses the learning rate.
        cost: ``(config, data, equal) -> int``: what a token costs, in ``parameters`` or ``flops``.
        metric: The headline metric of a result.
        references: Parts of a result that are the same for all models.
    """

    read: Callable[[RunConfig], Any]
    divide: Callable[[Any, bool], Any]
    train: Callable[[RunConfig, str, Any], dict]
    cost: Callable[[RunConfig, Any, str], int]
    metric: str = "loss"
    references: tuple[str, ...] = ("baseline", "chance")


def _train_language_model(config: RunConfig, recipe: str, parts: tuple) -> dict:
    choose, score = parts
    return language_model.train(config, recipe, corpus=score, validation=choose, pictures=False)


def _language_cost(config: RunConfig, corpus: Any, equal: str) -> int:
    with torch.device("meta"):  # sizes without numbers
        model = build_model(config, corpus)
    return model.num_active_parameters() if equal == "parameters" else forward_flops(model, config.seq_len)


LANGUAGE = Task(
    read=language_model.read_corpus,
    # One half of the held-out text chooses the learning rate; every result is on the other.
    divide=lambda corpus, tuning: corpus.split_held_out() if tuning else (None, corpus),
    train=_train_language_model,
    cost=_language_cost,
)
"""Predict the next token of a text."""


def study(
    config: RunConfig,
    recipe: str,
    reference: str,
    arms_of: Callable[[Any], Arms],
    *,
    trained_as: str = "coupled_lm",
    task: Task = LANGUAGE,
    headline: str | None = None,
) -> None:
    """Train what is missing of a comparison and report it; with ``--evaluate`` report what is finished.

    Args:
        config: The flags of the comparison, with ``num_seeds`` and ``learning_rates``.
        recipe: Its name.
        reference: The arm that the others are compared with.
        arms_of: The arms, by name, on the data; called before anything is written.
        trained_as: The recipe that the runs carry.
        task: What the models do.
        headline: The arm whose mean metric ``result.json`` also has under the name of the metric, beside the
            sizes of its first run.

    Raises:
        ConfigError: Under a launcher of several processes.
    """
    if config.evaluate is not None:
        report(config.evaluate, recipe, reference, task=task, headline=headline)
        return
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if launched_processes() > 1:
        what = "a comparison trains its models one after another in one process"
        raise ConfigError(what, "torchrun", "no launcher", f"{launched_processes()} processes")
    open_run(config, dry=True)
    data = task.read(config)
    say(f"data: {data.describe()}")
    arms = arms_of(data)
    run_dir = open_run(config)
    with checkpoint.RunLock(run_dir):
        checkpoint.atomic_write_bytes(run_dir / "config.yaml", to_yaml(config, recipe))
        seeds = range(config.seed, config.seed + config.num_seeds)
        rates = config.learning_rates
        tune_and_train(arms, run_dir, data, rates=rates, seeds=seeds, recipe=trained_as, task=task)
        report(run_dir, recipe, reference, task=task, headline=headline)


def match_cost(
    arms: Arms, reference: str, data: Any, *, equal: str, task: Task = LANGUAGE
) -> dict[str, RunConfig]:
    """Give the experts of every arm the width at which its cost is nearest the reference's.

    Args:
        arms: Configs by name.
        reference: The arm whose width stays.
        data: Sets the vocabulary.
        equal: ``parameters`` (active ones) or ``flops`` (of a forward pass, per token).
        task: Knows what a model costs.

    Raises:
        ConfigError: If no width brings an arm within 1 % of the reference.
    """
    aim = task.cost(arms[reference], data, equal)
    matched = {}
    for name, config in arms.items():
        # Both costs are linear in the width of the experts.
        low, high = (task.cost(_with_width(config, width), data, equal) for width in (8, 16))
        width = config.expert_dim if name == reference else max(1, 8 + round((aim - low) * 8 / (high - low)))
        matched[name] = _with_width(config, width)
        cost = task.cost(matched[name], data, equal)
        if abs(cost / aim - 1) > 0.01:
            what = f"no width of the experts gives {name} as many {equal} as {reference}"
            raise ConfigError(what, "--expert_dim", f"{aim:,} within 1 %", f"{cost:,}")
        unit = "active parameters" if equal == "parameters" else "operations"
        say(f"{name}: experts of {width} channels, {cost:,} {unit} a token")
    return matched


def tune_and_train(
    arms: Arms,
    run_dir: Path,
    data: Any,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    recipe: str = "coupled_lm",
    task: Task = LANGUAGE,
) -> None:
    """Train every arm with every learning rate on the first seed, and with its best one on the others.

    Runs that are finished are kept, one that was stopped goes on. All arms have one seed before any has
    two. What chooses the learning rate is never what results are on. With a single rate there is nothing to
    choose.

    Args:
        arms: Configs by name.
        run_dir: Where the runs go.
        data: What they are trained and scored on.
        rates: Learning rates to choose from.
        seeds: Seeds of every arm.
        recipe: The recipe that the runs belong to, whose command evaluates and resumes them.
        task: What the models do.
    """
    tuning = len(rates) > 1
    total = len(arms) * (len(rates) + len(seeds) - 1)
    study = _Study(run_dir, recipe, task, task.divide(data, tuning), total)
    if not tuning:
        _keep_rates(run_dir, {name: {} for name in arms}, dict.fromkeys(arms, rates[0]))
        for seed in seeds:
            for name, config in arms.items():
                study.train(name, config, rates[0], seed)
        return
    losses: dict[str, dict[float, float]] = {name: {} for name in arms}
    for rate in rates:
        for name, config in arms.items():
            result = study.train(name, config, rate, seeds[0])
            losses[name][rate] = result["validation"]["loss"]
    best = {name: min(tried, key=tried.__getitem__) for name, tried in losses.items()}
    for name, tried in losses.items():
        text = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
        say(f"{name}: learning rate {best[name]:g}; losses that chose it: {text}")
    _keep_rates(run_dir, losses, best)
    for seed in seeds[1:]:
        for name, config in arms.items():
            study.train(name, config, best[name], seed)


def report(
    run_dir: str | os.PathLike,
    recipe: str,
    baseline: str,
    *,
    task: Task = LANGUAGE,
    headline: str | None = None,
) -> None:
    """Print the table of the finished runs of a comparison; write it, its pictures and ``result.json``.

    Args:
        run_dir: Where the runs are.
        recipe: Name of the comparison.
        baseline: The arm that the others are compared with, if it is among them.
        task: What the models do.
        headline: The arm that the result is also about by itself, if it is among them.

    Raises:
        CheckpointError: If the comparison has not got so far, or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    best = checkpoint.read_json(run_dir / TUNING)["best"]
    finished = set(_finished(run_dir))
    records, labels = [], []
    for name, rate in best.items():
        for path in sorted(finished & set(run_dir.glob(f"{name}-lr{rate:g}-seed*"))):
            records.append(checkpoint.read(path))
            labels.append(name)
    if not records:
        raise CheckpointError("no run is finished", run_dir)
    table = compare(records, baseline=baseline if baseline in labels else None, labels=labels)
    say(table.markdown())
    results = [record.result for record in records]
    metrics = {}
    for name in dict.fromkeys(labels):
        values = [
            r["metrics"][task.metric] for r, label in zip(results, labels, strict=True) if label == name
        ]
        metrics[name] = sum(values) / len(values)
    same = (*task.references, "dataset", "device", "versions")
    sizes = {}
    if headline in metrics:
        metrics[task.metric] = metrics[headline]
        first = results[labels.index(headline)]
        names = ("steps", "seed", "peak_rss_mb", "params_total", "params_active", "flops_per_token")
        sizes = {name: first[name] for name in names}
    result = {"recipe": recipe, "metrics": metrics, **{key: results[0][key] for key in same}}
    result |= sizes
    result["seconds"] = sum(checkpoint.read(path).result["seconds"] for path in finished)
    checkpoint.write_json(run_dir / "result.json", result)
    for path in table.save(run_dir):
        say(str(path))


@dataclasses.dataclass
class _Study:
    """Trains runs one after another, skips what is finished and says how much is left."""

    run_dir: Path
    recipe: str
    task: Task
    parts: Any
    total: int
    done: int = 0
    trained: int = 0
    seconds: float = 0.0

    def train(self, name: str, config: RunConfig, rate: float, seed: int) -> dict:
        """The result of one run."""
        run_name = f"{name}-lr{rate:g}-seed{seed}"
        path = self.run_dir / run_name
        config = dataclasses.replace(
            config, learning_rate=rate, seed=seed, run_name=run_name, out_dir=os.fspath(self.run_dir)
        )
        self.done += 1
        if (path / "config.yaml").is_file():
            different = changed(from_run(type(config), path), config)
            if different:
                what = f"there is a run with other settings: {', '.join(different)}"
                raise ConfigError(what, path, "the same settings, --overwrite or another --run_name")
            if (path / "result.json").is_file():
                return checkpoint.read_json(path / "result.json")
            config = dataclasses.replace(config, resume=True)
        left = ""
        if self.trained:
            minutes = self.seconds / self.trained * (self.total - self.done + 1) / 60
            left = f"; about {minutes:.0f} min left"
        say(f"\nrun {self.done} of {self.total}: {run_name}{left}")
        began = time.perf_counter()
        result = self.task.train(config, self.recipe, self.parts)
        self.trained, self.seconds = self.trained + 1, self.seconds + time.perf_counter() - began
        return result


def _keep_rates(
    run_dir: Path, losses: Mapping[str, Mapping[float, float]], best: Mapping[str, float]
) -> None:
    by_name = {name: {f"{rate:g}": loss for rate, loss in tried.items()} for name, tried in losses.items()}
    checkpoint.write_json(run_dir / TUNING, {"losses": by_name, "best": dict(best)})


def _finished(run_dir: Path) -> list[Path]:
    return [path.parent for path in run_dir.glob("*/result.json")]


def _with_width(config: RunConfig, width: int) -> RunConfig:
    return dataclasses.replace(config, expert_dim=width)
