"""The flags that all recipes about lottery tickets have."""

import math
from dataclasses import dataclass, field

from graphmoe.train.config import RunConfig, flag, with_default
from graphmoe.train.pruning_mask import SCOPES
from recipes.set_config import SetConfig

DENSE, TICKET = "dense", "ticket"
BRANCHES = (TICKET, "reinit", "random")
"""What is trained at a level: the ticket, its mask on other initial weights, as many random weights of it."""


@dataclass(kw_only=True)
class LotteryConfig(RunConfig):
    """Flags of a search for lottery tickets among classifiers of images."""

    max_steps: int = flag(2000, "optimiser steps to train each network for")
    eval_every: int = flag(500, "optimiser steps between evaluations on the validation part")
    save_every: int = flag(1000, "optimiser steps between checkpoints", aliases=["--save_interval"])
    log_every: int = flag(100, "optimiser steps between lines of metrics", aliases=["--log_interval"])
    keep_checkpoints: int = flag(1, "newest checkpoints to keep of each network")
    max_grad_norm: float = with_default(SetConfig, "max_grad_norm", math.inf)
    dataset: str = with_default(SetConfig, "dataset", "digits")
    validation: float = with_default(SetConfig, "validation", 0.02)
    split_seed: int = with_default(SetConfig, "split_seed", 0)
    shift: int | None = flag(0, "most pixels that a training image is moved, up or down and to a side")
    train_images: int | None = flag(None, "take only the first so many of the training images")
    test_images: int | None = flag(None, "take only the first so many of the test images")
    rounds: int = flag(6, "levels of sparsity: times that the network is trained, pruned and rewound")
    cut: float = flag(0.2, "share of the weights that one cut removes")
    cuts: int = flag(3, "cuts at once in a round; three of 20 %% remove 48.8 %%")
    scope: str = flag("layer", f"compare magnitudes within a layer or among all: {', '.join(SCOPES)}")
    rewind_step: int = flag(0, "step of the dense network whose weights a ticket begins with")
    branches: list[str] = field(
        default_factory=lambda: list(BRANCHES),
        metadata={"help": f"what to train at each level: ticket and some of {', '.join(BRANCHES[1:])}"},
    )
    num_seeds: int = flag(1, "seeds, from --seed on; all levels of one before the next")

    def __post_init__(self):
        super().__post_init__()
        self.require("validation", 0 < self.validation < 1, "a number > 0 and < 1")
        for name in ("split_seed", "rewind_step"):
            self.require(name, getattr(self, name) >= 0, "a number >= 0")
        self.require("shift", self.shift is None or self.shift >= 0, "a number >= 0")
        for name in ("rounds", "cuts", "num_seeds"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        self.require("cut", 0 < self.cut < 1, "a number > 0 and < 1")
        self.require("scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        self.require("rewind_step", self.rewind_step < self.max_steps, "fewer than --max_steps")
        fits = len(set(self.branches)) == len(self.branches) and TICKET in self.branches
        fits = fits and set(self.branches) <= set(BRANCHES)
        self.require("branches", fits, f"{TICKET} and different ones of {', '.join(BRANCHES[1:])}")
        self.require("parallel", self.parallel == "ddp", "ddp: sharded weights cannot be pruned")

    def share_cut(self, cut: float | None = None) -> float:
        """Share of the weights that a round removes, by cuts of ``cut``, by default ``--cut``."""
        return 1 - (1 - (self.cut if cut is None else cut)) ** self.cuts
