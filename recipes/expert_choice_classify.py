"""Do experts that choose their tokens make a better classifier? Against a dense model and token choice.

``python -m recipes.expert_choice_classify``, or with other texts: ``--dataset ag_news --data_dir DIR``

Three encoders of texts at equal arithmetic a token, over seeds: ``dense``; ``token_choice``, where every
token takes its ``--top_k`` experts and a loss balances their load; and ``expert_choice``, where every expert
takes its best tokens of each text, so that the load is even by construction and some tokens are chosen by
nobody. The experts of each are as wide as gives the FLOPs of ``token_choice``, rounding of short texts
included. Each arm chooses its learning rate, and each run its step, on the validation part; the table is
about the test part, and has TF-IDF with logistic regression, the most frequent class and a uniform guess
beside it. Stop it when you like: ``--resume`` goes on, ``--evaluate`` shows what is finished.

Three and a half minutes on one core with the defaults. Measured, three seeds, 345 test docstrings: dense
0.768 ± 0.006, token choice 0.759 ± 0.011, expert choice 0.748 ± 0.009; TF-IDF 0.823, most frequent class
0.432, chance 0.250. Here neither mixture beats the dense model, and none of the three beats TF-IDF.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging as transformers_logging

from graphmoe.train.config import exit_code, parse
from recipes import comparison
from recipes.classification import TASK
from recipes.classification_config import ClassifierConfig, EncodedText
from recipes.study_flags import RATES, StudyFlags, shared, some_of

HEADLINE, REFERENCE, MATCHED = "expert_choice", "dense", "token_choice"
"""The arm that the recipe is about, the one that the others are compared with, and the one whose cost all
have."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {"num_experts": 1, "top_k": 1},
    MATCHED: {},
    HEADLINE: {"router": "expert_choice", "router_aux_loss_coef": 0.0},
}


@dataclass(kw_only=True)
class ExpertChoiceClassifyConfig(StudyFlags, ClassifierConfig):
    """What all arms share; --top_k is what experts take in the mean, too."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata=some_of(ARMS))
    learning_rates: list[float] = field(default_factory=lambda: [2.5e-4, 5e-4, 1e-3], metadata=RATES)

    def __post_init__(self):
        super().__post_init__()
        self.require("router", self.router == "topk", "nothing: each arm has its own")
        self.require("num_experts", self.num_experts > 1, "at least 2: the dense arm has one by itself")
        self.require("is_causal", not self.is_causal, "false: experts that choose see the whole text")
        self.require_some_of("arms", ARMS)


def matched_arms(config: ExpertChoiceClassifyConfig, texts: EncodedText) -> dict[str, ClassifierConfig]:
    """The config of each chosen arm, its experts as wide as its cost has to be."""
    common = shared(config, ClassifierConfig)
    arms = {name: replace(common, **ARMS[name]) for name in dict.fromkeys((*config.arms, MATCHED))}
    arms = comparison.match_cost(arms, MATCHED, texts, equal="flops", task=TASK)
    return {name: arms[name] for name in config.arms}


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    name, about = "expert_choice_classify", __doc__.splitlines()[0]
    config = parse(ExpertChoiceClassifyConfig, argv, prog=f"python -m recipes.{name}", description=about)
    comparison.study(
        config, name, REFERENCE, lambda texts: matched_arms(config, texts),
        trained_as="classify", task=TASK, headline=HEADLINE,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
