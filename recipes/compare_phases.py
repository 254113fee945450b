"""Does coupling help? All architectures at equal active parameters, tokens and tuning, over seeds.

``python -m recipes.compare_phases``

The plain mixture sets the number of active parameters (or, with ``--equal flops``, of operations a
token), and the experts of every other phase are as wide as gives the same. Each phase is trained with
every learning rate of a grid on the first seed; the one that is best on one half of the held-out text
is trained on the other seeds too, and the other half is what the table reports. 39 minutes on two
cores; stop it when you like: ``--resume`` goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from transformers.utils import logging as transformers_logging

from graphmoe.data import Corpus
from graphmoe.train.config import RUN_ONLY, exit_code, flag, parse
from recipes import comparison
from recipes.coupled_lm import CoupledConfig
from recipes.language_model_config import LanguageModelConfig
from recipes.phases import MODES
from recipes.study_flags import RATES, StudyFlags, some_of

REFERENCE = "moe"
"""The phase that sets the active parameters, and that the others are compared with."""

BY_MODE = {
    name for name, f in CoupledConfig.__dataclass_fields__.items()
    if f.default is None and getattr(LanguageModelConfig, name, None) is not None
}  # fmt: skip
"""What a phase decides for itself."""


@dataclass(kw_only=True)
class CompareConfig(StudyFlags, LanguageModelConfig):
    """What all phases share."""

    max_steps: int = flag(360, "optimiser steps to train each model for")
    keep_checkpoints: int = flag(1, "newest checkpoints to keep of each run")
    sample_tokens: int = flag(0, "tokens of a sample of each model; 0 for none")
    num_ghosts: int = flag(2, "ghost experts of a block, in the phase that has them")
    equal: Literal["parameters", "flops"] = flag(
        "parameters", "what all phases have as much of, a token: active parameters, or arithmetic"
    )
    phases: list[str] = field(default_factory=lambda: list(MODES), metadata=some_of(MODES))
    learning_rates: list[float] = field(default_factory=lambda: [2e-3, 4e-3, 8e-3], metadata=RATES)

    def __post_init__(self):
        super().__post_init__()
        self.require_some_of("phases", MODES, with_=REFERENCE)
        for name in sorted(BY_MODE - {"expert_dim", "num_experts", "top_k", "num_ghosts"}):
            default = getattr(LanguageModelConfig, name)
            self.require(name, getattr(self, name) == default, "nothing: each phase has its own")


def phase_config(config: CompareConfig, phase: str) -> CoupledConfig:
    """The flags of one phase: what all share, and what the phase decides."""
    taken = {"expert_dim", "num_experts", "top_k"} if phase != "dense" else set()
    taken |= {"num_ghosts"} if phase == "ghost" else set()
    names = {f.name for f in fields(LanguageModelConfig)} - (BY_MODE - taken) - set(RUN_ONLY)
    shared = {name: getattr(config, name) for name in names}
    return CoupledConfig(architecture_mode=phase, **shared)


def matched_arms(config: CompareConfig, corpus: Corpus) -> dict[str, LanguageModelConfig]:
    """The config of each phase, its experts as wide as its cost has to be."""
    arms = {phase: phase_config(config, phase) for phase in config.phases}
    return comparison.match_cost(arms, REFERENCE, corpus, equal=config.equal)


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    about = __doc__.splitlines()[0]
    config = parse(CompareConfig, argv, prog="python -m recipes.compare_phases", description=about)
    comparison.study(config, "compare_phases", REFERENCE, lambda corpus: matched_arms(config, corpus))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
