"""A plain mixture-of-experts language model: the baseline of the coupled ones.

``python -m recipes.moe_lm``

Same data, steps and report as ``ghost_lm``.
"""

import sys
from collections.abc import Sequence

from recipes import language_model
from recipes.language_model_config import LanguageModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(
        LanguageModelConfig, argv, recipe="moe_lm", description=__doc__.splitlines()[0]
    )


if __name__ == "__main__":
    sys.exit(main())
