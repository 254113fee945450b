"""A dense transformer language model with the active parameters of the mixtures: their baseline.

``python -m recipes.dense_lm``

Same data, steps and report as ``ghost_lm``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.train.config import flag
from recipes import language_model
from recipes.language_model_config import LanguageModelConfig


@dataclass(kw_only=True)
class DenseConfig(LanguageModelConfig):
    """One expert as wide as the three that serve a token elsewhere, and no routing."""

    expert_dim: int = flag(384, "channels inside the feed-forward")
    num_experts: int = flag(1, "primary experts of a block; 1 is a dense model")
    top_k: int = flag(1, "experts a token")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(DenseConfig, argv, recipe="dense_lm", description=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
