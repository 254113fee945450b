"""Several language models on the same data: equal cost, equal tuning, seeds, one table."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from analysis.compare import compare
from graphmoe import checkpoint
from graphmoe.data import Corpus
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.models.cost import forward_flops
from graphmoe.train.config import changed, from_run, open_run, to_yaml
from graphmoe.train.ranks import launched_processes
from recipes import language_model
from recipes.language_model_config import LanguageModelConfig, build_model
from recipes.reporting import say

TUNING = "tuning.json"
Arms = Mapping[str, LanguageModelConfig]


def study(
    config: LanguageModelConfig,
    recipe: str,
    reference: str,
    arms_of: Callable[[Corpus], Arms],
    *,
    trained_as: str = "coupled_lm",
) -> None:
    """Train what is missing of a comparison and report it; with ``--evaluate`` report what is finished.

    Args:
        config: The flags of the comparison, with ``num_seeds`` and ``learning_rates``.
        recipe: Its name.
        reference: The arm that the others are compared with.
        arms_of: The arms, by name, on a corpus; called before anything is written.
        trained_as: The recipe that the runs carry.

    Raises:
        ConfigError: Under a launcher of several processes.
    """
    if config.evaluate is not None:
        report(config.evaluate, recipe, reference)
        return
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if launched_processes() > 1:
        what = "a comparison trains its models one after another in one process"
        raise ConfigError(what, "torchrun", "no launcher", f"{launched_processes()} processes")
    open_run(config, dry=True)
    corpus = language_model.read_corpus(config)
    say(f"corpus: {corpus.describe()}")
    arms = arms_of(corpus)
    run_dir = open_run(config)
    with checkpoint.RunLock(run_dir):
        checkpoint.atomic_write_bytes(run_dir / "config.yaml", to_yaml(config, recipe))
        seeds = range(config.seed, config.seed + config.num_seeds)
        rates = config.learning_rates
        tune_and_train(arms, run_dir, corpus, rates=rates, seeds=seeds, recipe=trained_as)
        report(run_dir, recipe, reference)


def match_cost(arms: Arms, reference: str, corpus: Corpus, *, equal: str) -> dict[str, LanguageModelConfig]:
    """Give the experts of every arm the width at which its cost is nearest the reference's.

    Args:
        arms: Configs by name.
        reference: The arm whose width stays.
        corpus: Sets the vocabulary.
        equal: ``parameters`` (active ones) or ``flops`` (of a forward pass, per token).

    Raises:
        ConfigError: If no width brings an arm within 1 % of the reference.
    """
    aim = _cost(arms[reference], corpus, equal)
    matched = {}
    for name, config in arms.items():
        # Both costs are linear in the width of the experts.
        low, high = (_cost(_with_width(config, width), corpus, equal) for width in (8, 16))
        width = config.expert_dim if name == reference else max(1, 8 + round((aim - low) * 8 / (high - low)))
        matched[name] = _with_width(config, width)
        cost = _cost(matched[name], corpus, equal)
        if abs(cost / aim - 1) > 0.01:
            what = f"no width of the experts gives {name} as many {equal} as {reference}"
            raise ConfigError(what, "--expert_dim", f"{aim:,} within 1 %", f"{cost:,}")
        unit = "active parameters" if equal == "parameters" else "operations"
        say(f"{name}: experts of {width} channels, {cost:,} {unit} a token")
    return matched


def tune_and_train(
    arms: Arms,
    run_dir: Path,
    corpus: Corpus,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    recipe: str = "coupled_lm",
) -> None:
    """Train every arm with every learning rate on the first seed, and with its best one on the others.

    Runs that are finished are kept, one that was stopped goes on. All arms have one seed before any has
    two. One half of the held-out text chooses the learning rate; every result is on the other. With a
    single rate there is nothing to choose, and results are on all of it.

    Args:
        arms: Configs by name.
        run_dir: Where the runs go.
        corpus: What they are trained and scored on.
        rates: Learning rates to choose from.
        seeds: Seeds of every arm.
        recipe: The recipe that the runs belong to, whose command evaluates and resumes them.
    """
    choose, score = corpus.split_held_out() if len(rates) > 1 else (None, corpus)
    total = len(arms) * (len(rates) + len(seeds) - 1)
    study = _Study(run_dir, recipe, score, choose, total)
    if choose is None:
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


def report(run_dir: str | os.PathLike, recipe: str, baseline: str) -> None:
    """Print the table of the finished runs of a comparison; write it, its pictures and ``result.json``.

    Args:
        run_dir: Where the runs are.
        recipe: Name of the comparison.
        baseline: The arm that the others are compared with, if it is among them.

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
        losses = [r["metrics"]["loss"] for r, label in zip(results, labels, strict=True) if label == name]
        metrics[name] = sum(losses) / len(losses)
    same = ("baseline", "chance", "dataset", "device", "versions")
    result = {"recipe": recipe, "metrics": metrics, **{key: results[0][key] for key in same}}
    result["seconds"] = sum(checkpoint.read(path).result["seconds"] for path in finished)
    checkpoint.write_json(run_dir / "result.json", result)
    for path in table.save(run_dir):
        say(str(path))


@dataclasses.dataclass
class _Study:
    """Trains runs one after another, skips what is finished and says how much is left."""

    run_dir: Path
    recipe: str
    score: Corpus
    choose: Corpus | None
    total: int
    done: int = 0
    trained: int = 0
    seconds: float = 0.0

    def train(self, name: str, config: LanguageModelConfig, rate: float, seed: int) -> dict:
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
        result = language_model.train(
            config, self.recipe, corpus=self.score, validation=self.choose, pictures=False
        )
        self.trained, self.seconds = self.trained + 1, self.seconds + time.perf_counter() - began
        return result


def _keep_rates(
    run_dir: Path, losses: Mapping[str, Mapping[float, float]], best: Mapping[str, float]
) -> None:
    by_name = {name: {f"{rate:g}": loss for rate, loss in tried.items()} for name, tried in losses.items()}
    checkpoint.write_json(run_dir / TUNING, {"losses": by_name, "best": dict(best)})


def _finished(run_dir: Path) -> list[Path]:
    return [path.parent for path in run_dir.glob("*/result.json")]


def _with_width(config: LanguageModelConfig, width: int) -> LanguageModelConfig:
    return dataclasses.replace(config, expert_dim=width)


def _cost(config: LanguageModelConfig, corpus: Corpus, equal: str) -> int:
    with torch.device("meta"):  # sizes without numbers
        model = build_model(config, corpus)
    return model.num_active_parameters() if equal == "parameters" else forward_flops(model, config.seq_len)
