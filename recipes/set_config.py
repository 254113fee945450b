"""The flags of the sparse classifiers of images, the images, the model, and what they are held against."""

import math
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from graphmoe.data.image_batches import ImageBatches
from graphmoe.data.images import ImageData, load_images
from graphmoe.models import SparseMLP, SparseMLPConfig
from graphmoe.nn.sparse import DISTRIBUTIONS, er_total_density
from graphmoe.train.config import RunConfig, flag
from recipes.rewire_flags import RewireFlags


@dataclass(kw_only=True)
class SetConfig(RewireFlags, RunConfig):
    """Flags of a sparse classifier of images."""

    max_steps: int = flag(1000, "optimiser steps to train for")
    epochs: float | None = flag(None, "passes over the training images, instead of max_steps")
    batch_size: int = flag(128, "images in a batch, in all processes together")
    learning_rate: float = flag(2e-3, "peak learning rate")
    weight_decay: float = flag(0.0, "decoupled weight decay of dense layers; edges do not decay")
    adam_beta2: float = flag(0.99, "decay of AdamW's mean of squared gradients", aliases=["--beta2"])
    warmup_steps: int = flag(300, "optimiser steps until the peak learning rate")
    max_grad_norm: float = flag(
        math.inf, "largest norm of all gradients together; inf does not clip", aliases=["--grad_clip"]
    )
    eval_every: int = flag(200, "optimiser steps between evaluations on the validation part")
    save_every: int = flag(500, "optimiser steps between checkpoints", aliases=["--save_interval"])
    log_every: int = flag(50, "optimiser steps between lines of metrics", aliases=["--log_interval"])
    dataset: str = flag(
        "digits", "digits (of scikit-learn), mnist, fashion_mnist, cifar10, or a name on the hub"
    )
    validation: float = flag(0.02, "share of the training images to watch, not to train on")
    train_images: int | None = flag(None, "take only the first so many of the training images")
    test_images: int | None = flag(None, "take only the first so many of the test images")
    split_seed: int = flag(0, "seed of the division into parts, the same for all --seed")
    shift: int | None = flag(
        None, "most pixels that a training image is moved, up or down and to a side; 1 of 28 without it"
    )
    hidden_dim: int = flag(1000, "neurons of a hidden layer")
    num_layers: int = flag(3, "hidden layers")
    density: float = flag(0.05, "edges, as a share of the weights of the dense network")
    epsilon: float | None = flag(
        None, "instead of density: edges a neuron, epsilon (i + o) in a layer of i x o places"
    )
    distribution: str = flag("er", f"how layers share them: {', '.join(DISTRIBUTIONS)}")
    dense_output: bool = flag(True, "give the last layer all its edges, which count")
    dropout: float = flag(0.2, "dropout behind hidden layers")

    def __post_init__(self):
        super().__post_init__()
        self.require("epochs", self.epochs is None or 0 < self.epochs < math.inf, "a number > 0")
        self.require("validation", 0 < self.validation < 1, "a number > 0 and < 1")
        self.require("split_seed", self.split_seed >= 0, "a number >= 0")
        self.require("density", 0 < self.density <= 1, "a number > 0 and <= 1")
        self.require("epsilon", self.epsilon is None or 0 < self.epsilon < math.inf, "a number > 0")
        self.require("distribution", self.distribution in DISTRIBUTIONS, f"one of {', '.join(DISTRIBUTIONS)}")
        for name in ("hidden_dim", "num_layers"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        self.require("shift", self.shift is None or self.shift >= 0, "a number >= 0")
        self.require("dropout", 0 <= self.dropout < 1, "a number >= 0 and < 1")


@dataclass(frozen=True, eq=False)
class Images:
    """Images, and what a linear model makes of them."""

    data: ImageData

    def describe(self) -> str:
        """One plain line."""
        return self.data.describe()

    @cached_property
    def logistic(self) -> dict[str, float | str]:
        """Logistic regression on pixels, trained on the training part: scores on the test part."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        began, data = time.perf_counter(), self.data
        train, test = (data.normalise(part.images).reshape(len(part), -1) for part in (data.train, data.test))
        with warnings.catch_warnings():
            # A hundred iterations are what it gets; more change the third digit.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=0.1, max_iter=100).fit(train, data.train.labels)
        known = np.searchsorted(model.classes_, data.test.labels)
        loss = -model.predict_log_proba(test)[np.arange(len(known)), known].mean()
        return {
            "name": "logistic regression",
            "test_accuracy": float(model.score(test, data.test.labels)),
            "loss": float(loss),
            "baseline_seconds": time.perf_counter() - began,
        }


def read_images(config: SetConfig) -> Images:
    """The images that the flags name."""
    return Images(
        load_images(
            config.dataset,
            config.data_dir,
            validation=config.validation,
            seed=config.split_seed,
            train_images=config.train_images,
            test_images=config.test_images,
        )
    )


def read_batches(config: SetConfig, images: Images) -> ImageBatches:
    """The training part, as batches."""
    side = min(images.data.image_shape[1:])
    shift = side // 28 if config.shift is None else config.shift
    return ImageBatches(images.data, seed=config.seed, shift=shift)


def with_steps(config: SetConfig, batches: ImageBatches) -> SetConfig:
    """The config with epochs as steps, those between rewirings included."""
    epoch = batches.steps_per_epoch(config.batch_size)
    per_step = config.gradient_accumulation_steps
    if config.epochs is not None:
        config = replace(config, max_steps=math.ceil(config.epochs * epoch / per_step))
    if config.rewire_every is None:
        config = replace(config, rewire_every=max(1, epoch // per_step))
    return config


def build_model(config: SetConfig, images: Images) -> SparseMLP:
    """The model of a config on these images.

    Raises:
        ConfigError: More edges than places, or fewer than dense layers alone have.
    """
    names = images.data.class_names
    shape = {
        "input_size": math.prod(images.data.image_shape),
        "hidden_sizes": [config.hidden_dim] * config.num_layers,
        "num_labels": len(names),
        "dense_output": config.dense_output,
    }
    if config.topology == "dense":
        shape["density"] = 1.0
    elif config.epsilon is None:
        shape |= {"density": config.density, "distribution": config.distribution}
    else:
        dense = {config.num_layers} if config.dense_output else ()
        shapes = SparseMLPConfig(**shape | {"density": 1.0}).shapes()
        shape |= {"density": er_total_density(shapes, config.epsilon, dense=dense), "distribution": "er"}
    ids = dict(enumerate(names))
    return SparseMLP(
        SparseMLPConfig(
            **shape,
            dropout=config.dropout,
            id2label=ids,
            label2id={name: index for index, name in ids.items()},
        )
    )
