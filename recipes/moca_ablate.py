"""What are slots, experts, sparse routing, width and budgets worth? One at a time, over seeds, copying.

``python -m recipes.moca_ablate``

Around ``full``, the network of ``moca_copy`` at a smaller size, one thing changes at a time: ``no_memory``
has no slots, ``no_experts`` a feed-forward of the size of one expert, in ``dense_routing`` every token reads
and writes every slot and passes through every expert, ``half_size`` has half the channels. ``budget_...``
are other weights of the budget loss: what they save of the edges of both routers stands beside what they
recall. Every arm has one seed before any has two. Stop it when you like: ``--resume`` goes on, ``--evaluate``
shows what is finished.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging as transformers_logging

from graphmoe.data.copy_task import CopyTask
from graphmoe.train.config import exit_code, flag, parse
from recipes import comparison
from recipes.frame import train
from recipes.moca_config import MocaCopyConfig
from recipes.moca_copy import MocaCopyJob
from recipes.study_flags import StudyFlags, shared

FULL = "full"
PARTS = ("no_memory", "no_experts", "dense_routing", "half_size")
"""Arms that change a part of the network."""


@dataclass(kw_only=True)
class MocaAblateConfig(StudyFlags, MocaCopyConfig):
    """What all arms share, and the settings that they vary."""

    max_steps: int = flag(500, "optimiser steps to train each network for")
    num_tokens: int = flag(62, "different tokens of a sequence")
    min_length: int = flag(4, "tokens of the shortest sequence")
    max_length: int = flag(20, "tokens of the longest sequence")
    embed_dim: int = flag(64, "channels of a token and of a slot", aliases=["--d_model"])
    expert_dim: int = flag(128, "channels inside one expert")
    num_slots: int = flag(16, "memory slots")
    test_sequences: int = flag(500, "fresh sequences scored at the end")
    baseline_steps: int = flag(0, "no_memory is an arm here")
    keep_checkpoints: int = flag(1, "newest checkpoints to keep of each run")
    budgets: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 5.0],
        metadata={"help": "weights of the budget loss beside that of full, --budget_coef"},
    )
    arms: list[str] | None = field(default=None, metadata={"help": "some of the arms; all without it"})
    learning_rates: list[float] = field(
        default_factory=lambda: [2e-3], metadata={"help": "the learning rate of all arms, a single one"}
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("num_slots", self.num_slots >= 2, "a number >= 2: no_memory has none by itself")
        self.require("num_experts", self.num_experts >= 2, "a number >= 2: no_experts has one by itself")
        self.require("baseline_steps", self.baseline_steps == 0, "0: no_memory is an arm")
        distinct = len(set(self.budgets)) == len(self.budgets) and self.budget_coef not in self.budgets
        self.require("budgets", distinct and min(self.budgets, default=0) >= 0, "different numbers >= 0")
        self.require("learning_rates", len(self.learning_rates) == 1, "a single number")
        if self.arms is not None:
            self.require_some_of("arms", changes_of(self))


def changes_of(config: MocaAblateConfig) -> dict[str, Mapping[str, Any]]:
    """What each arm changes, by its name."""
    heads = {"num_heads": max(1, config.num_heads // 2)} if config.embed_dim // 2 % config.num_heads else {}
    arms: dict[str, Mapping[str, Any]] = {
        FULL: {},
        "no_memory": {"num_slots": 0},
        "no_experts": {"num_experts": 1, "top_k": 1},
        "dense_routing": {"slots_per_token": config.num_slots, "top_k": config.num_experts},
        "half_size": {"embed_dim": config.embed_dim // 2, "expert_dim": config.expert_dim // 2} | heads,
    }
    return arms | {f"budget_{value:g}": {"budget_coef": value} for value in config.budgets}


def arms_of(config: MocaAblateConfig) -> dict[str, MocaCopyConfig]:
    """The config of each chosen arm."""
    common = shared(config, MocaCopyConfig)
    changes = changes_of(config)
    return {name: replace(common, **changes[name]) for name in config.arms or changes}


def train_arm(config: MocaCopyConfig, recipe: str, task: CopyTask) -> dict:
    """The result of one run."""
    return train(MocaCopyJob, config, recipe, pictures=False)


TASK = comparison.Task(
    read=lambda config: config.task("train"),
    divide=lambda task, tuning: task,
    train=train_arm,
    cost=lambda config, task, equal: 0,  # widths are not matched: parts are taken away
    metric="accuracy",
    references=("chance",),
)
"""Say a sequence again."""


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    about = __doc__.splitlines()[0]
    config = parse(MocaAblateConfig, argv, prog="python -m recipes.moca_ablate", description=about)
    arms = arms_of(config)
    comparison.study(config, "moca_ablate", FULL, lambda task: arms, trained_as="moca_copy", task=TASK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
