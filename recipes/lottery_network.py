"""One network of a search for lottery tickets: its mask, where it begins, and what is known of it."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphmoe.data.images import ImageData
from graphmoe.errors import ConfigError
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.lottery import EnforceMasks, KeepState, Masks, Rewind
from recipes import frame
from recipes.lottery_config import DENSE, LotteryConfig
from recipes.reporting import say, speed
from recipes.set_config import Images, read_batches, read_images
from recipes.set_mnist import references, score

MASKS, START = "masks.safetensors", "start.safetensors"
"""Files of masks, in every checkpoint, and of the weights that tickets begin with, in the dense run."""


class Place(NamedTuple):
    """Where in a search a network stands.

    Attributes:
        level: 0 for the dense network.
        branch: ``dense``, ``ticket``, ``reinit`` or ``random``.
        masks: What exists.
        start: File of the weights that it begins with; without it with its own, from step 0.
    """

    level: int
    branch: str
    masks: Masks
    start: Path | None = None

    @property
    def name(self) -> str:
        """Name of its folder inside that of the dense network."""
        return f"level-{self.level:02d}-{self.branch}"


class NetworkJob(frame.Job):
    """One network of a search.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        images: Data already at hand; by default those that the flags name.
        place: Where the network stands; by default it is the dense one.
    """

    config: LotteryConfig
    unit = "image"

    def __init__(
        self,
        config: LotteryConfig,
        recipe: str,
        *,
        images: Images | None = None,
        place: Place | None = None,
    ):
        if images is None:
            images = read_images(config)
            say(f"images: {images.describe()}")
        super().__init__(config, recipe)
        self.images, self.data = images, self.inputs(images.data)
        self.batches = read_batches(config, Images(self.data))
        self.batches.steps_per_epoch(config.batch_size)  # says so now if there are too few
        if not len(images.data.validation):
            raise ConfigError(
                "no image to watch", "--validation", f"a larger share of {len(images.data.train)}"
            )
        self.dataset, self.fingerprint = images.data.name, images.data.fingerprint
        if place is not None and place.branch == "reinit":
            # The control has weights that nobody else has.
            numbers = np.random.SeedSequence([config.seed, place.level]).generate_state(1, np.uint64)
            torch.manual_seed(int(numbers[0]) % 2**63)
        self.model = self.build_model()
        self.place = place or Place(0, DENSE, Masks.full(self.model, self.prunable()))
        self._enforce = EnforceMasks(self.place.masks)

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """A new dense network for the images, with random weights of torch's generator; it takes
        ``pixel_values`` and ``labels`` and returns ``loss`` and ``logits``."""

    @abstractmethod
    def prunable(self) -> list[str]:
        """Names of the parameters of ``self.model`` that are pruned, see
        :func:`~graphmoe.train.lottery.prunable_weights`."""

    def inputs(self, data: ImageData) -> ImageData:
        """The images as the network gets them; the baseline has them as they are given."""
        return data

    def size(self) -> dict[str, int]:
        pruned = self.place.masks.total - self.place.masks.remaining
        total = super().size()["params_total"]
        return {"params_total": total, "params_active": total - pruned}

    def batch(self, index: int, size: int, slots: slice) -> dict[str, Tensor]:
        images, labels = self.batches.batch(index, size, slots)
        return {"pixel_values": torch.from_numpy(images), "labels": torch.from_numpy(labels)}

    def movers(self) -> list[Callback]:
        start, step = self.place.start, self.config.rewind_step
        if self.place.branch == DENSE:
            return [KeepState(self.folder / START, step), self._enforce]
        return [self._enforce] if start is None else [Rewind(start, step), self._enforce]

    def extras(self) -> tuple[Callable[[Path], None], ...]:
        return (lambda folder: self.place.masks.save(folder / MASKS),)

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        return score(model, self.data, self.data.validation)

    def conclude(self, state: TrainState) -> dict:
        self.model.eval()
        masks, data = self.place.masks, self.data
        outside = masks.outside(self.model, state.optimizer)
        metrics = score(self.model, data, data.test)
        metrics |= {"test_accuracy": metrics["accuracy"], "images_per_second": speed(state.run_dir)}
        result = {
            "metrics": metrics,
            "validation": score(self.model, data, data.validation),
            "seed": self.config.seed,
            "level": self.place.level,
            "branch": self.place.branch,
            "weights": masks.remaining,
            "total": masks.total,
            "layers": masks.counts,
            "outside_mask": sum(outside.values()),
            "audits": self._enforce.audits,
        }
        return result | references(self.images)

    def report(self, result: dict) -> None:
        metrics, branch = result["metrics"], self.place.branch
        entries = f"{result['outside_mask']} entries outside the mask"
        say(f"{branch}: test accuracy {100 * metrics['accuracy']:.2f} %, {entries}")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.config.out_dir) / self.config.run_name


def summary(result: dict) -> dict:
    """What a search keeps of one network."""
    keys = ("seed", "level", "branch", "weights", "total", "layers", "outside_mask", "validation")
    return {key: result[key] for key in keys} | {"accuracy": result["metrics"]["accuracy"]}
