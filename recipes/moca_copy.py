"""Say a sequence of up to 60 tokens again, from memory slots that tokens write and read along routed edges.

``python -m recipes.moca_copy``, or a slot for every token: ``python -m recipes.moca_copy --num_slots 64``

The network sees each token once; behind a delimiter it gets blanks only, and nothing but the memory reaches
from a token to its blank. Only blanks are scored, on sequences never seen. The same network without a memory
(``--num_slots 0``) is trained for a few steps in the same run as a baseline, beside chance (0.8 %).

Measured on 1000 fresh sequences, seeds 0, 1 and 2: 32 slots recall 99.93, 99.93 and 99.95 % of the tokens,
64 slots 99.98, 99.95 and 99.96 %; both keep 55 % of the edges; without memory 0.8 %. 70 CPU seconds.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.models import MocaForTokenPrediction, load
from graphmoe.train.budget import BudgetRamp
from graphmoe.train.loop import Callback, TrainState
from recipes.frame import Job
from recipes.frame import main as run
from recipes.moca_config import MocaCopyConfig
from recipes.moca_scores import by_length, distinct_slots, figures, least_distance, one_sequence, recall
from recipes.reporting import say, speed

BASELINE = "no_memory"
"""Folder of the baseline's run inside that of the memory."""


class MocaCopyJob(Job):
    """A network of slots and experts, sequences to copy and fresh ones to score it on."""

    def __init__(self, config: MocaCopyConfig, recipe: str):
        super().__init__(config, recipe)
        self.task, self.validation, self.test = map(config.task, ("train", "validation", "test"))
        self.dataset, self.fingerprint = config.dataset, self.task.fingerprint
        self.model = MocaForTokenPrediction(config.architecture())
        self.first_distance = None
        if config.num_slots:
            self.first_distance = least_distance(self.model.model.layers[0].memory.bank.slots)
        slots = f"{config.num_slots} slots" if config.num_slots else "no memory"
        say(f"data: {self.task.describe()}; {slots}, {config.num_experts} experts")

    def batch(self, index: int, size: int, slots: slice) -> dict:
        return self.task.batch(index, size, slots) | {"output_records": True}

    def facts(self) -> dict[str, object]:
        config = self.config
        return {"k": config.top_k, "num_experts": config.num_experts, "coupling": "none", "num_ghosts": 0}

    def movers(self) -> list[Callback]:
        config = self.config
        return [*super().movers(), BudgetRamp(config.budget_begin, config.budget_end)]

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        found = figures(recall(model, self.validation, self.config.eval_sequences))
        return {
            "loss": found["loss"],
            "accuracy": found["recall_accuracy"],
            "edges_kept": found["edges_kept"],
        }

    def score(self, state: TrainState) -> dict:
        """The baseline's result, which all processes train for."""
        config = self.config
        if not config.num_slots or not config.baseline_steps:
            return {}
        steps = min(config.baseline_steps, config.max_steps)
        return self.train_beside(BASELINE, num_slots=0, budget_coef=0.0, max_steps=steps)

    def final_records(self, state: TrainState) -> dict[str, Tensor]:
        self.scores = recall(self.model, self.test, self.config.test_sequences)
        length = torch.arange(int(self.scores["length"].max()) + 1)
        total = torch.bincount(self.scores["length"], self.scores["length"], minlength=len(length))
        right = torch.bincount(self.scores["length"], self.scores["right"], minlength=len(length))
        seen = total > 0
        records = {
            "final_copy_length": length[seen],
            "final_copy_accuracy": (right[seen] / total[seen]).float(),
        }
        if self.config.num_slots:
            self.shown = one_sequence(self.model, self.test)
            records |= {
                f"final_memory_{name}": value for name, value in self.shown.items() if name != "slots"
            }
            records["final_memory_load"] = self.scores["slot_load"]
        return records

    def conclude(self, state: TrainState) -> dict:
        config = self.config
        found = figures(self.scores)
        metrics = {"recall_accuracy": found["recall_accuracy"], "accuracy": found["recall_accuracy"]}
        metrics |= found | {"tokens_per_second": speed(state.run_dir)}
        result = {
            "metrics": metrics,
            "chance": {"recall_accuracy": 1 / config.num_tokens, "loss": math.log(config.num_tokens)},
            "baseline": {"name": "one token at random"} | {"recall_accuracy": 1 / config.num_tokens},
            "by_length": by_length(self.scores),
        }
        if self.scored:
            names = ("recall_accuracy", "exact_sequences", "loss")
            without = {name: self.scored["metrics"][name] for name in names}
            result["baseline"] = {"name": "no memory"} | without | {"steps": self.scored["steps"]}
        result["experts"] = self.records.summary() | {"edges_kept": found["edges_kept"]}
        if config.num_slots:
            write, slots = self.shown["write"], self.shown["slots"]
            bank = self.model.model.layers[0].memory.bank.slots
            result["memory"] = {
                "distinct_slots": distinct_slots(write, config.max_length),
                "tokens": config.max_length,
                "least_distance_first": self.first_distance,
                "least_distance_learned": least_distance(bank),
                "least_distance_written": least_distance(slots),
            }
        for part in ("chance", "baseline"):
            result[part]["accuracy"] = result[part]["recall_accuracy"]
        return result

    def report(self, result: dict) -> None:
        table(result)
        say(f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_mb']:,.0f} MB")

    @classmethod
    def evaluate(cls, config: MocaCopyConfig, recipe: str) -> None:
        model = load(config.evaluate)
        if not isinstance(model, MocaForTokenPrediction):
            raise ConfigError(
                "no network that copies", config.evaluate, "a run of this recipe", type(model).__name__
            )
        scores = recall(model, config.task("test"), config.test_sequences)
        chance = {"recall_accuracy": 1 / config.num_tokens}
        table({"metrics": figures(scores), "by_length": by_length(scores), "chance": chance})


def table(result: dict) -> None:
    """Say how much was recalled, beside the network without memory and chance."""
    metrics, chance = result["metrics"], 100 * result["chance"]["recall_accuracy"]
    exact = f"{100 * metrics['exact_sequences']:.1f} % of sequences without a mistake"
    say(f"recalled: {100 * metrics['recall_accuracy']:.2f} % of tokens, {exact}; chance {chance:.2f} %")
    baseline = result.get("baseline", {})
    if "steps" in baseline:
        say(f"{baseline['name']}, {baseline['steps']} steps: {100 * baseline['recall_accuracy']:.2f} %")
    say("by length: " + ", ".join(f"{name}: {100 * v:.2f} %" for name, v in result["by_length"].items()))
    say(f"edges kept: {100 * metrics['edges_kept']:.1f} %")
    if "memory" in result:
        memory = result["memory"]
        distances = [memory[f"least_distance_{when}"] for when in ("first", "learned", "written")]
        text = ", ".join("-" if d is None else f"{d:.2f}" for d in distances)
        say(f"{memory['distinct_slots']} slots are the first choice of {memory['tokens']} tokens")
        say(f"least distance of two slots at first, learned, written: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    about = __doc__.splitlines()[0]
    return run(MocaCopyConfig, argv, recipe="moca_copy", description=about, job=MocaCopyJob)


if __name__ == "__main__":
    sys.exit(main())
