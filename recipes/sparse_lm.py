"""A language model whose experts are sets of edges that evolve while they learn (SET).

``python -m recipes.sparse_lm``

Every expert is five times as wide as in ``moe_lm`` and has a fifth of the edges. Every 20 steps the weakest
30 % of them go and as many come at random places. ``--beside narrow wide static`` trains others on the same
batches: matrices with as many weights (``moe_lm``), matrices of the same width, edges that stay.
"""

import sys
from collections.abc import Sequence

from recipes import frame
from recipes.sparse_experts import SparseExpertsConfig, SparseExpertsJob


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    about = __doc__.splitlines()[0]
    return frame.main(SparseExpertsConfig, argv, recipe="sparse_lm", description=about, job=SparseExpertsJob)


if __name__ == "__main__":
    sys.exit(main())
