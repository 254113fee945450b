"""Experts coupled by a hypergraph neural network: a language model.

``python -m recipes.hgnn_lm``

Same data, steps and report as ``ghost_lm``; ``recipes.compare_phases`` compares them at equal cost.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.train.config import flag
from recipes import language_model
from recipes.language_model_config import LanguageModelConfig


@dataclass(kw_only=True)
class HgnnConfig(LanguageModelConfig):
    """Sets of a token's experts act together, with learned weights."""

    coupling: str = flag("hyper", "how the experts of a token talk: none, gnn or hyper")
    coupling_norm: bool = flag(True, "RMSNorm of what the experts of a token say to one another")
    coupling_scale: float | None = flag(0.1, "start of a learned factor of what coupling adds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(HgnnConfig, argv, recipe="hgnn_lm", description=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
