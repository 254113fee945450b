"""Hypergraph-coupled experts under adaptive pressure to differ: a language model.

``python -m recipes.orthogonal_lm``

Every block adjusts the strength of its orthogonality loss to how specialised its experts are. Same
data, steps and report as ``ghost_lm``; ``recipes.compare_phases`` compares them at equal cost.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.train.config import flag
from recipes import language_model
from recipes.hgnn_lm import HgnnConfig


@dataclass(kw_only=True)
class OrthogonalConfig(HgnnConfig):
    """Hypergraph coupling and adaptive orthogonality."""

    orthogonality_output_coef: float = flag(0.1, "weight of the orthogonality of mean expert outputs")
    orthogonality_weight_coef: float = flag(0.05, "weight of the orthogonality of expert weights")
    orthogonality_adaptive: bool = flag(True, "adjust the strength of each block to its specialisation")
    # A run of a few hundred steps would end before the first adjustment with longer ones.
    orthogonality_interval: int = flag(50, "optimiser steps between adjustments of the adaptive strength")
    orthogonality_warmup_steps: int = flag(100, "optimiser steps until orthogonality has full strength")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(
        OrthogonalConfig, argv, recipe="orthogonal_lm", description=__doc__.splitlines()[0]
    )


if __name__ == "__main__":
    sys.exit(main())
