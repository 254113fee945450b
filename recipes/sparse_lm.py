"""A language model whose experts are sets of edges that evolve while they learn (SET).

``python -m recipes.sparse_lm``

Every expert is five times as wide as in ``moe_lm`` and has a fifth of the edges. Every 20 steps the weakest
30 % of them go and as many come at random places. ``--beside narrow wide static`` trains others on the same
batches: matrices with as many weights (``moe_lm``), matrices of the same width, edges that stay.

By the time of its steps, five minutes on one core. Measured, three seeds, ``--max_steps 180 --final_windows
800``: 2.010, 2.014 and 2.119 held-out bits per byte with edges that evolve, 2.005, 2.019 and 2.111 with edges
that stay, 2.035, 2.049 and 2.142 with matrices of as many weights, 2.015, 2.039 and 2.113 with those of the
same width; a unigram model has 2.721, 2.749 and 2.797. In equal
time matrices of as many weights do twice the steps and reach 1.832 (seed 0).
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
