"""Mixture of Collaboration: the experts of a token talk before they return to it: a language model.

``python -m recipes.moc_lm``, or with a file of the original system, ``python -m recipes.moc_lm train.yaml``

Router, experts that reason in two steps, two rounds of attention between the experts of a token and a
learned mediator, and a gate between both. No expert has a limited capacity by default: what a limit drops
depends on later tokens, which a causal model must not see. Same data and report as ``ghost_lm``, and as many
minutes, but fewer steps: a token costs more than twice the operations.
Three minutes on two cores. Measured with the defaults, one seed: 1.88 held-out bits per byte after 400 steps,
where a unigram model of the same tokens has 2.72. Claimed elsewhere: nothing, no result of such a model was
ever published; ``recipes.moc_ablate`` measures what its parts are worth.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.errors import ConfigError
from recipes import language_model
from recipes.collaboration_config import switch
from recipes.language_model_config import LanguageModelConfig, with_default


@dataclass(kw_only=True)
class MocConfig(LanguageModelConfig):
    """Collaboration in two rounds with a mediator, and experts that reason in two steps."""

    max_steps: int = with_default("max_steps", 400)
    num_experts: int = with_default("num_experts", 8)
    top_k: int = with_default("top_k", 2)
    coupling: str = with_default("coupling", "collab")
    coupling_layers: int | None = with_default("coupling_layers", 2)
    fusion: str = with_default("fusion", "gated")
    reasoning_steps: int = with_default("reasoning_steps", 2)
    use_moc_collab: bool | None = switch("false: experts do not collaborate, --coupling none")
    use_simple_collab: bool | None = switch(
        "true: collaboration as in the first version, one round without a mediator"
    )

    def __post_init__(self):
        # Words of the original: once they have decided, what they decided can be changed again.
        if self.use_moc_collab and self.use_simple_collab:
            expected = "false where --use_moc_collab is true"
            raise ConfigError("two kinds of collaboration", "--use_simple_collab", expected, True)
        if self.use_simple_collab:
            self.coupling, self.coupling_layers, self.collab_mediator = "collab", 1, False
        elif self.use_moc_collab is not None:
            self.coupling = "collab" if self.use_moc_collab else "none"
            self.diversity_coef = self.diversity_coef if self.use_moc_collab else 0.0
        self.use_moc_collab = self.use_simple_collab = None
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(MocConfig, argv, recipe="moc_lm", description=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
