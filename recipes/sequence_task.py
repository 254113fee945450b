"""What the recipes of the differentiable neural computer share: one model, one task, an LSTM beside it."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe.data.algorithmic import BitTask
from graphmoe.errors import ConfigError
from graphmoe.models import DNCForSequencePrediction, load
from graphmoe.models.sequence_prediction import SequencePredictionModel
from graphmoe.train.config import from_run
from graphmoe.train.loop import TrainState
from recipes.dnc_config import BASELINE, SequenceConfig
from recipes.frame import Job
from recipes.reporting import say

WATCH, FIRST, SECOND = 0, 1, 2
"""Numbers of the sets of sequences: to watch training by, and to report on."""


class SequenceJob(Job):
    """A computer, or an LSTM, that answers sequences drawn from the seed."""

    unit = "bit"

    def __init__(self, config: SequenceConfig, recipe: str):
        super().__init__(config, recipe)
        self.task = config.task()
        self.dataset, self.fingerprint = self.task.name, self.task.fingerprint
        self.model = config.build()
        say(f"{config.model} on {self.task}")

    def batch(self, index: int, size: int, slots: slice) -> dict[str, Tensor]:
        step = index // self.config.gradient_accumulation_steps
        longest = self.config.longest(step)
        inputs, labels = self.task.batch(self.config.seed, index, size, slots, longest)
        return {"input_values": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        count = min(200, self.config.eval_sequences)
        lengths = range(self.task.shortest, self.config.length + 1)
        return figures(*errors(model, self.task, self.config.seed, WATCH, lengths, count))

    def score(self, state: TrainState) -> dict:
        """The baseline's result, which all processes train for."""
        config = self.config
        if config.model == BASELINE or not config.baseline_steps:
            return {}
        rare = max(config.eval_every, config.baseline_steps // 10)
        changes = {"max_steps": config.baseline_steps, "eval_every": rare, "save_every": rare}
        return self.train_beside(BASELINE, model=BASELINE, **changes)

    def conclude(self, state: TrainState) -> dict:
        result = scores(self.config, self.model)
        if self.scored:
            result["baseline"] = {"name": "LSTM of equal size", **self.scored["metrics"]}
            names = ("steps", "params_total", "seconds")
            result["baseline_run"] = {name: self.scored[name] for name in names}
        return result

    def final_records(self, state: TrainState) -> dict[str, Tensor]:
        if not isinstance(self.model, DNCForSequencePrediction):
            return {}
        return trajectory(self.model, self.task, self.config)

    def report(self, result: dict) -> None:
        table(result, self.task.answers)
        say(f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_mb']:,.0f} MB")

    @classmethod
    def evaluate(cls, config: SequenceConfig, recipe: str) -> None:
        """Score a finished run, with other slots and beyond its lengths if the flags say so."""
        model = load(config.evaluate)
        if not isinstance(model, SequencePredictionModel):
            raise ConfigError(
                "no model of sequences", config.evaluate, "a run of this recipe", type(model).__name__
            )
        trained = from_run(type(config), config.evaluate)
        table(scores(config, model), config.task().answers)
        if config.length > trained.length:
            say(f"trained up to {trained.length}; the difficulties above it are new to the model")


def errors(
    model: nn.Module,
    task: BitTask,
    seed: int,
    part: int,
    lengths: Iterable[int],
    count: int,
    num_slots: int | None = None,
) -> tuple[int, int, float]:
    """Wrong answers, all answers, and the share of sequences without a wrong one, on one set.

    Args:
        model: In eval mode.
        task: What to draw from.
        seed: Of the run.
        part: Number of the set.
        lengths: Difficulties, each with as many sequences.
        count: Sequences in all, at least one of each difficulty.
        num_slots: Slots in place of those of the model.
    """
    lengths = list(lengths)
    each = -(-count // len(lengths))
    device = next(model.parameters()).device
    wrong = asked = exact = 0
    for length in lengths:
        inputs, labels = task.of_length(seed, part, length, each)
        with torch.no_grad():
            logits = model(torch.from_numpy(inputs).to(device), num_slots=num_slots).logits
        found = task.wrong(logits.float().cpu().numpy(), labels).reshape(each, -1)
        wrong, asked = wrong + int(found.sum()), asked + found.size
        exact += int((~found.any(axis=1)).sum())
    return wrong, asked, exact / (each * len(lengths))


def figures(wrong: int, asked: int, exact: float) -> dict[str, float]:
    """The same as shares."""
    return {"errors": wrong, "accuracy": 1 - wrong / asked, "exact": exact}


def scores(config: SequenceConfig, model: SequencePredictionModel) -> dict[str, dict]:
    """Both final sets, every difficulty, those beyond training with few and with more slots; and chance."""
    training, task = model.training, config.task()
    model.eval()
    computer = isinstance(model, DNCForSequencePrediction)
    lengths = range(task.shortest, config.length + 1)
    few = config.slots if computer else None
    drawn = (config.seed, FIRST, lengths, config.eval_sequences)
    wrong, asked, exact = errors(model, task, *drawn, few)
    again, asked_again, _ = errors(model, task, config.seed, SECOND, lengths, config.eval_sequences, few)
    hardest = errors(model, task, config.seed, FIRST, [config.length], 200, few)
    metrics = {
        "bit_errors" if task.answers == "bits" else "errors": wrong,
        "second_set": again,
        "accuracy": 1 - (wrong + again) / (asked + asked_again),
        "exact": exact,
        "hardest_accuracy": 1 - hardest[0] / hardest[1],
    }
    beyond = []
    for length in config.beyond():
        for slots in (config.more_slots, config.slots) if computer else (None,):
            wrong, count, _ = errors(model, task, config.seed, FIRST, [length], 100, slots)
            beyond.append({"length": length, "slots": slots, "errors": wrong, "asked": count})
    model.train(training)
    return {"metrics": metrics, "chance": {"accuracy": task.chance}, "asked": asked, "beyond": beyond}


def table(result: dict, answers: str) -> None:
    """Say accuracies and errors beside the baseline and chance."""
    parts = [("model", result["metrics"])]
    if "baseline" in result:
        parts.append((result["baseline"]["name"], result["baseline"]))
    for name, row in parts:
        count = row.get("bit_errors", row.get("errors"))
        say(
            f"{name}: {100 * row['accuracy']:.3f} % of {answers} right; wrong {count} and "
            f"{row['second_set']} of {result['asked']:,} each on two sets; "
            f"hardest {100 * row['hardest_accuracy']:.3f} %; "
            f"sequences without an error {100 * row['exact']:.1f} %"
        )
    say(f"chance: {100 * result['chance']['accuracy']:.1f} % of {answers}")
    for row in result["beyond"]:
        slots = f", {row['slots']} slots" if row["slots"] else ""
        share = row["errors"] / row["asked"]
        say(f"difficulty {row['length']}{slots}: {100 * share:.3f} % of {answers} wrong")


def trajectory(model: DNCForSequencePrediction, task: BitTask, config: SequenceConfig) -> dict[str, Tensor]:
    """What one sequence did to the memory, for pictures: of a difficulty that can still be drawn."""
    training = model.training
    model.eval()
    inputs, labels = task.of_length(config.seed, FIRST, min(config.length, 10), 1)
    device = next(model.parameters()).device
    with torch.no_grad():
        out = model(torch.from_numpy(inputs).to(device), num_slots=config.slots, output_states=True)
    model.train(training)
    scored = task.wrong(out.logits.float().cpu().numpy(), labels)

    def over_time(name: str) -> Tensor:
        return torch.stack([getattr(state, name)[0] for state in out.states]).float().cpu()

    return {
        "final_dnc_input": torch.from_numpy(np.ascontiguousarray(inputs[0])),
        "final_dnc_asked": torch.from_numpy(labels[0] >= 0).any(dim=-1).float(),
        "final_dnc_output": torch.sigmoid(out.logits[0]).float().cpu(),
        "final_dnc_usage": over_time("usage"),
        "final_dnc_write": over_time("write_weights"),
        "final_dnc_read": over_time("read_weights"),
        "final_dnc_allocates": out.allocates[:, 0, 0].float().cpu(),
        "final_dnc_link": out.state.link[0].float().cpu(),
        "final_dnc_wrong": torch.tensor([int(scored.sum()), scored.size]),
    }
