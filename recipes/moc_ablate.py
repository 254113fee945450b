"""What are the parts of a Mixture of Collaboration worth? One at a time, or all together, over seeds.

``python -m recipes.moc_ablate``, or all combinations, for a GPU: ``python -m recipes.moc_ablate --grid``

Around the model of ``moc_lm`` one thing changes at a time: rounds R of collaboration, the mediator, steps S
of reasoning, experts k a token, experts E of a block, a limit to their capacity, the width of collaboration,
and whether anybody hears anybody at all (``alone``: all maps and operations, no talk). Baselines are a dense
model and a plain mixture (``moe``). All have as many active parameters as ``moc``: the experts of each are as
wide as that takes. They train on the same tokens; what a token costs in operations differs and stands in
the table, and ``moe_flops`` is a plain mixture of as many operations as ``moc``. Every arm has one seed
before any has two. Stop it when you like: ``--resume`` goes on, ``--evaluate`` shows what is finished.

Measured as two processes of one thread with half of the arms each, whose runs were then put together: 38
minutes on two cores; as one process of two threads about 45, an estimate.
Claimed elsewhere: nothing; no result of such a model was ever published. Measured, three seeds: at this size
collaboration makes the model worse, see docs/collaboration.md.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging as transformers_logging

from graphmoe.data import Corpus
from graphmoe.train.config import exit_code, flag, parse
from recipes import comparison
from recipes.moc_lm import MocConfig
from recipes.study_flags import StudyFlags, shared

DEFAULT, REFERENCE, SAME_FLOPS = "moc", "moe", "moe_flops"
"""The arm that sets the active parameters, the one that the others are compared with, and that arm again
with the operations of the first."""
LETTERS = {"R": "coupling_layers", "S": "reasoning_steps", "k": "top_k", "E": "num_experts"}
FACTORS = {"R": (0, 1, 2, 4), "S": (1, 2, 4), "k": (1, 2, 4), "E": (4, 16)}
_SILENT = {"coupling_layers": 0, "diversity_coef": 0.0}
_PLAIN = {
    "coupling": "none", "coupling_layers": None, "diversity_coef": 0.0,
    "reasoning_steps": 0, "fusion": "sum", "capacity_factor": None,
}  # fmt: skip
BASELINES = {
    REFERENCE: _PLAIN,
    "dense": _PLAIN | {"num_experts": 1, "top_k": 1, "router": "topk"},
    SAME_FLOPS: _PLAIN,
}


@dataclass(kw_only=True)
class AblateConfig(StudyFlags, MocConfig):
    """What all arms share, and the setting that they vary."""

    max_steps: int = flag(180, "optimiser steps to train each model for")
    num_layers: int = flag(3, "blocks", aliases=["--n_layers"])
    eval_every: int = flag(45, "optimiser steps between evaluations")
    eval_windows: int = flag(32, "held-out sequences scored while training")
    final_windows: int | None = flag(256, "held-out sequences scored at the end")
    keep_checkpoints: int = flag(1, "newest checkpoints to keep of each run")
    sample_tokens: int = flag(0, "most tokens of a sample of each model; 0 for none")
    arms: list[str] | None = field(default=None, metadata={"help": "some of the arms; all without it"})
    grid: bool = flag(False, "all combinations of R, the mediator, S and k, and the baselines")

    def __post_init__(self):
        super().__post_init__()
        self.require("coupling", self.coupling == "collab" and self.coupling_layers != 0, "collab")
        if self.arms is not None:
            self.require_some_of("arms", [DEFAULT, *changes_of(self)])


def changes_of(config: AblateConfig) -> dict[str, Mapping[str, Any]]:
    """What each arm but ``moc`` changes, by its name."""
    return (grid(config) if config.grid else one_at_a_time(config)) | BASELINES


def one_at_a_time(config: AblateConfig) -> dict[str, Mapping[str, Any]]:
    """Arms that differ from ``moc`` in one thing."""
    arms: dict[str, Mapping[str, Any]] = {}
    for letter, values in FACTORS.items():
        name = LETTERS[letter]
        for value in values:
            possible = (
                config.top_k <= value if letter == "E" else letter != "k" or value <= config.num_experts
            )
            if possible and value != getattr(config, name):
                arms[f"{letter}{value}"] = _SILENT if (letter, value) == ("R", 0) else {name: value}
    arms["no_mediator" if config.collab_mediator else "mediator"] = {
        "collab_mediator": not config.collab_mediator
    }
    if config.capacity_factor is None:
        arms["capacity1.25"] = {"capacity_factor": 1.25}
    arms["narrow"] = {"collab_dim": max(1, (config.collab_dim or config.embed_dim) // 2)}
    arms["alone"] = {"collab_graph": "self"}
    return arms


def grid(config: AblateConfig) -> dict[str, Mapping[str, Any]]:
    """All combinations of the factors; without rounds there is nothing to mediate."""
    arms = {}
    for rounds, mediator, steps, k in itertools.product(FACTORS["R"], (0, 1), FACTORS["S"], FACTORS["k"]):
        if k <= config.num_experts and (rounds or not mediator):
            changes = {"coupling_layers": rounds, "collab_mediator": bool(mediator)}
            changes |= {"reasoning_steps": steps, "top_k": k} | ({} if rounds else _SILENT)
            if any(getattr(config, name) != value for name, value in changes.items()):
                arms[f"R{rounds}-M{mediator}-S{steps}-k{k}"] = changes
    return arms


def matched_arms(config: AblateConfig, corpus: Corpus) -> dict[str, MocConfig]:
    """The config of each chosen arm, its experts as wide as its cost has to be."""
    default = shared(config, MocConfig, less=("decode_rounds", "decode_steps"))
    arms = {DEFAULT: default}
    chosen = config.arms or [DEFAULT, *changes_of(config)]
    arms |= {
        name: replace(default, **changes) for name, changes in changes_of(config).items() if name in chosen
    }
    costly = {name: arm for name, arm in arms.items() if name in (DEFAULT, SAME_FLOPS)}
    arms = comparison.match_cost(
        {name: arm for name, arm in arms.items() if name != SAME_FLOPS}, DEFAULT, corpus, equal="parameters"
    )
    if SAME_FLOPS in costly:
        arms |= comparison.match_cost(costly, DEFAULT, corpus, equal="flops")
    return {name: arm for name, arm in arms.items() if name in chosen}


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    about = __doc__.splitlines()[0]
    config = parse(AblateConfig, argv, prog="python -m recipes.moc_ablate", description=about)
    comparison.study(
        config, "moc_ablate", REFERENCE, lambda corpus: matched_arms(config, corpus), trained_as="moc_lm"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
