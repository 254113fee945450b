"""Lottery tickets in a vision transformer: does a sparse one beat the dense one that it was found in?

``python -m recipes.lottery_vit``, four blocks of 64 channels for scikit-learn's digits, or six of 192 with
``--dataset cifar10 --data_dir DIR --embed_dim 192 --num_layers 6 --num_heads 6 --shift 4 --flip --bf16
--patch_dropout 0.75 --learning_rate 7e-4 --max_steps 600 --warmup_steps 60 --rewind_step 30 --rounds 5``

A patch is 4 x 4 pixels, 2 x 2 of the small digits. A round trains, removes the 48.8 % of the weights that
have least magnitude among those of all blocks (20 % three times), and puts all others, biases and norms
included, back to where they were after a twentieth of the steps
(`Frankle et al. 2020 <https://arxiv.org/abs/1912.05671>`_). What may go are the linear maps of the blocks:
queries, keys, values, outputs and both layers of the feed-forward. Patch and position embeddings, the class
token, norms, biases and the classifier stay. The published claim is 64.8 % at 49 % sparsity on CIFAR-10, the
ticket above the dense network. All accuracies are on test images after the last step, on which nothing is
chosen; beside them stand the images that only one of two networks gets right, logistic regression on pixels
and a uniform guess.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from graphmoe.data import ImageBatches
from graphmoe.errors import ConfigError
from graphmoe.models.vit import PatchDropout
from graphmoe.train.config import flag, resolve_device, with_default
from graphmoe.train.loop import TrainState
from graphmoe.train.lottery import prunable_weights
from recipes import frame
from recipes.lottery import LotteryJob
from recipes.lottery_config import DENSE, LotteryConfig
from recipes.lottery_pairs import paired, say_pairs, wrong_answers

FIXED = ("vit.embeddings", "classifier")
"""Modules that are not pruned."""


@dataclass(kw_only=True)
class LotteryViTConfig(LotteryConfig):
    """Flags of tickets in a vision transformer."""

    max_steps: int = flag(200, "optimiser steps to train each network for")
    rounds: int = flag(3, "levels of sparsity: times that the network is trained, pruned and rewound")
    batch_size: int = flag(64, "images in a batch, in all processes together")
    eval_every: int = flag(200, "optimiser steps between evaluations on the validation part")
    save_every: int = flag(200, "optimiser steps between checkpoints", aliases=["--save_interval"])
    learning_rate: float = flag(2e-3, "peak learning rate")
    adam_beta2: float = with_default(LotteryConfig, "adam_beta2", 0.99)
    warmup_steps: int = flag(20, "optimiser steps until the peak learning rate")
    max_grad_norm: float = with_default(LotteryConfig, "max_grad_norm", 1.0)
    scope: str = flag("global", "compare magnitudes within a layer, or among all: layer, global")
    rewind_step: int = flag(10, "step of the dense network whose weights a ticket begins with")
    validation: float = flag(0.05, "share of the training images to watch, not to train on")
    flip: bool = flag(False, "mirror each training image, left to right, with probability 1/2")
    embed_dim: int = flag(64, "channels of a patch")
    num_layers: int = flag(4, "blocks")
    num_heads: int = flag(4, "attention heads")
    mlp_ratio: int = flag(4, "channels inside the feed-forward, as a multiple of embed_dim")
    patch_size: int | None = flag(
        None, "height and width of a patch, pixels; without it 4, of small images 2"
    )
    initializer_range: float = flag(0.06, "standard deviation of initial weights; transformers has 0.02")
    patch_dropout: float = flag(0.0, "share of the patches of a training image that is left out")
    dropout: float = flag(0.0, "dropout behind each part of a block, and behind the embeddings")

    def __post_init__(self):
        super().__post_init__()
        for name in ("embed_dim", "num_layers", "num_heads", "mlp_ratio", "patch_size"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "a number >= 1")
        self.require("embed_dim", self.embed_dim % self.num_heads == 0, "a multiple of --num_heads")
        self.require("initializer_range", self.initializer_range > 0, "a number > 0")
        for name in ("patch_dropout", "dropout"):
            self.require(name, 0 <= getattr(self, name) < 1, "a number >= 0 and < 1")


class LotteryViTJob(LotteryJob):
    """A search in a vision transformer; arguments as of :class:`~recipes.lottery.LotteryJob`."""

    model: ViTForImageClassification
    config: LotteryViTConfig

    def __init__(self, config: LotteryViTConfig, recipe: str, **options):
        super().__init__(config, recipe, **options)
        self.batches = ImageBatches(self.data, seed=config.seed, shift=config.shift or 0, flip=config.flip)

    def build_model(self) -> ViTForImageClassification:
        config, data = self.config, self.images.data
        colours, height, width = data.image_shape
        patch = config.patch_size or (4 if min(height, width) >= 16 else 2)
        if height % patch or width % patch:
            raise ConfigError(f"patches do not cover images of {height} x {width}", "--patch_size",
                              "a divisor of both", patch)  # fmt: skip
        # On a CPU the backward pass of the fused attention takes several times that of plain products.
        attention = "sdpa" if resolve_device(config.device) == "cuda" else "eager"
        names = data.class_names
        model = ViTForImageClassification(
            ViTConfig(
                image_size=(height, width),
                patch_size=patch,
                num_channels=colours,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_ratio * config.embed_dim,
                hidden_dropout_prob=config.dropout,
                initializer_range=config.initializer_range,
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
                attn_implementation=attention,
            )
        )
        if config.patch_dropout:
            embeddings = model.vit.embeddings
            embeddings.dropout = nn.Sequential(embeddings.dropout, PatchDropout(config.patch_dropout))
        return model

    def prunable(self) -> list[str]:
        return prunable_weights(self.model, exclude=FIXED)

    def conclude(self, state: TrainState) -> dict:
        result, data = super().conclude(state), self.data
        result["wrong"] = wrong_answers(self.model, data, data.test)
        if self.place.branch == DENSE:
            keys = ("seed", "level", "branch")
            result["pairs"] = [
                {key: other[key] for key in keys}
                | {"share": other["weights"] / other["total"]}
                | paired(other["wrong"], result["wrong"])
                for other in self.scored["levels"]
            ]
            for other in self.scored["seeds"]:
                result["pairs"] += other["pairs"]
        return result

    def report(self, result: dict) -> None:
        if self.place.branch == DENSE:
            say_pairs(result["pairs"], len(self.images.data.test))
        super().report(result)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    about = __doc__.splitlines()[0]
    return frame.main(LotteryViTConfig, argv, recipe="lottery_vit", description=about, job=LotteryViTJob)


if __name__ == "__main__":
    sys.exit(main())
