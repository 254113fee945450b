"""A language model whose experts choose their tokens, in the form that does not see the future.

``python -m recipes.expert_choice_lm``

Plain expert choice compares a token with later ones, so a causal model refuses it. Here a token goes to an
expert
when its probability exceeds a threshold: a running mean, over optimiser steps, of what it took to be among
the tokens that the expert would have taken of a batch. Tokens have as many experts as they deserve, --top_k
in the mean, some have none; no balancing loss is needed. Same data, steps and report as ``moe_lm``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from recipes import language_model
from recipes.language_model_config import LanguageModelConfig, with_default


@dataclass(kw_only=True)
class ExpertChoiceConfig(LanguageModelConfig):
    """What differs from a plain mixture."""

    router: str = with_default("router", "threshold")
    router_aux_loss_coef: float = with_default("router_aux_loss_coef", 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    about = __doc__.splitlines()[0]
    return language_model.main(ExpertChoiceConfig, argv, recipe="expert_choice_lm", description=about)


if __name__ == "__main__":
    sys.exit(main())
