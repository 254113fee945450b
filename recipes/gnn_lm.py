"""Experts coupled by a gated graph neural network: a language model.

``python -m recipes.gnn_lm``

Same data, steps and report as ``ghost_lm``; ``recipes.compare_phases`` compares them at equal cost.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.train.config import flag
from recipes import language_model
from recipes.language_model_config import LanguageModelConfig


@dataclass(kw_only=True)
class GnnConfig(LanguageModelConfig):
    """Every pair of a token's experts is joined by a learned connection and a gate."""

    coupling: str = flag("gnn", "how the experts of a token talk: none, gnn or hyper")
    coupling_layers: int | None = flag(1, "rounds of coupling")
    coupling_norm: bool = flag(True, "RMSNorm of what the experts of a token say to one another")
    coupling_scale: float | None = flag(0.1, "start of a learned factor of what coupling adds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(GnnConfig, argv, recipe="gnn_lm", description=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
