"""Do edges that evolve make a better classifier? Against edges that stay, and against all weights.

``python -m recipes.set_study``, or
``python -m recipes.set_study --dataset mnist --data_dir DIR --epochs 20 --num_threads 1``

The same network over seeds: ``set`` (random growth), ``rigl`` (growth by gradients), ``static`` (the first
edges stay) at equal numbers of edges, and ``dense`` with all weights; its steps take longer, and
``--dense_epochs`` gives it as much time instead of as many steps. With several ``--learning_rates`` each
arm chooses its own on the validation part. The table is about test images, and has logistic regression on
pixels and a uniform guess beside it. Stop it when you like: ``--resume`` goes on, ``--evaluate`` shows what
is finished.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from transformers.utils import logging as transformers_logging

from graphmoe.train.config import exit_code, flag, parse
from recipes import comparison
from recipes.frame import train
from recipes.set_config import Images, SetConfig, build_model, read_batches, read_images, with_steps
from recipes.set_mnist import REFERENCES, SetJob
from recipes.study_flags import RATES, StudyFlags, shared, some_of

HEADLINE, REFERENCE = "set", "static"
"""The arm that the recipe is about, and the one that the others are compared with."""
ARMS = (REFERENCE, HEADLINE, "rigl", "dense")


def _cost(config: SetConfig, images: Images, equal: str) -> int:
    # A multiplication and an addition for each edge.
    edges = build_model(config, images).num_edges()
    return edges if equal == "parameters" else 2 * edges


TASK = comparison.Task(
    read=read_images,
    divide=lambda images, tuning: images,  # they have a validation part of their own
    train=lambda config, recipe, images: train(SetJob, config, recipe, images=images, pictures=False),
    cost=_cost,
    metric="test_accuracy",
    references=REFERENCES,
)
"""Tell the class of an image."""


@dataclass(kw_only=True)
class SetStudyConfig(StudyFlags, SetConfig):
    """What all arms share."""

    arms: list[str] = field(default_factory=lambda: [HEADLINE, REFERENCE, "dense"], metadata=some_of(ARMS))
    learning_rates: list[float] = field(default_factory=lambda: [2e-3], metadata=RATES)
    dense_epochs: float | None = flag(
        None, "epochs of the dense network, whose steps take longer; as many as the others without it"
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("topology", self.topology == "set", "nothing: each arm has its own")
        self.require_some_of("arms", ARMS)
        given = self.dense_epochs
        self.require("dense_epochs", given is None or 0 < given < math.inf, "a number > 0")


def arms_of(config: SetStudyConfig, images: Images) -> dict[str, SetConfig]:
    """The config of each chosen arm on these images, with the numbers of steps that its run is to have: those
    of a run that goes on are compared with them."""
    common = shared(config, SetConfig)
    found = {name: replace(common, topology=name) for name in config.arms}
    if "dense" in found and config.dense_epochs is not None:
        found["dense"] = replace(found["dense"], epochs=config.dense_epochs)
    batches = read_batches(common, images)
    return {name: with_steps(arm, batches) for name, arm in found.items()}


def run(argv: Sequence[str] | None) -> None:
    """Parse the command line, train what is missing and report."""
    about = __doc__.splitlines()[0]
    config = parse(SetStudyConfig, argv, prog="python -m recipes.set_study", description=about)
    comparison.study(
        config, "set_study", REFERENCE, partial(arms_of, config),
        trained_as="set_mnist", task=TASK, headline=HEADLINE,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    transformers_logging.disable_progress_bar()
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
