"""Which way of balancing experts costs least? An auxiliary loss, a bias, thresholds, or nothing, over seeds.

``python -m recipes.balance_study``

One language model, one learning rate, the same tokens; what differs is how the load of its experts is kept
even. ``aux`` adds the loss of the Switch Transformer; ``bias`` moves a bias of each expert by its load and no
loss; ``threshold`` lets experts choose by thresholds that follow their load; ``none`` does nothing. The table
and ``balance.png`` set what each reaches on held-out text beside the MaxVio of its training steps (largest
load over mean load, minus 1; mean over layers and the last 100 steps) and beside the sampling floor: what a
router that chooses blindly would show. Stop it when you like: ``--resume`` goes on, ``--evaluate`` shows what
is finished.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging as transformers_logging

from graphmoe.train.config import exit_code, flag, parse
from recipes import comparison
from recipes.language_model_config import LanguageModelConfig, with_default
from recipes.study_flags import StudyFlags, shared, some_of

REFERENCE = "aux"
"""The arm that the others are compared with."""
_NO_LOSS = {"router_aux_loss_coef": 0.0}
ARMS: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "none": _NO_LOSS,
    "bias": _NO_LOSS | {"router_bias": True},
    "threshold": _NO_LOSS | {"router": "threshold"},
}


@dataclass(kw_only=True)
class BalanceConfig(StudyFlags, LanguageModelConfig):
    """What all arms share; ``aux`` has the coefficient of the balancing loss, ``bias`` the rate."""

    max_steps: int = flag(250, "optimiser steps to train each model for")
    batch_size: int = flag(64, "sequences in a batch")
    seq_len: int = with_default("seq_len", 64)
    num_layers: int = with_default("num_layers", 3)
    num_experts: int = with_default("num_experts", 8)
    top_k: int = with_default("top_k", 2)
    router_bias_rate: float = with_default("router_bias_rate", 0.01)
    eval_every: int = flag(50, "optimiser steps between evaluations")
    log_every: int = flag(1, "optimiser steps between records of the load")
    final_windows: int | None = flag(1024, "held-out sequences scored at the end")
    keep_checkpoints: int = flag(1, "newest checkpoints to keep of each run")
    sample_tokens: int = flag(0, "most tokens of a sample of each model; 0 for none")
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata=some_of(ARMS))

    def __post_init__(self):
        super().__post_init__()
        own = self.router == "topk" and not self.router_bias
        self.require("router", own, "nothing: each arm has its own")
        coefficient = self.router_aux_loss_coef
        self.require("router_aux_loss_coef", coefficient > 0, "a number > 0, that of the arm aux")
        self.require_some_of("arms", ARMS)


def arms_of(config: BalanceConfig) -> dict[str, LanguageModelConfig]:
    """The config of each chosen arm; all have the same parameters."""
    common = shared(config, LanguageModelConfig)
    return {name: replace(common, **ARMS[name]) for name in config.arms}


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    about = __doc__.splitlines()[0]
    config = parse(BalanceConfig, argv, prog="python -m recipes.balance_study", description=about)
    comparison.study(config, "balance_study", REFERENCE, lambda corpus: arms_of(config), trained_as="moe_lm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
