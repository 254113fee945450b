"""Levels of sparsity: a network is trained, pruned, rewound and trained again, beside its controls.

The run of the dense network holds those of all levels, a folder each, and those of further seeds. What is
finished is not trained again when the run is resumed. The table of all of them is in :mod:`lottery_table`.
"""

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphmoe import checkpoint
from graphmoe.data.images import ImageData
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.train.config import changed, from_run
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.lottery import EnforceMasks, KeepState, Masks, Rewind, require_enforced
from recipes import frame
from recipes.lottery_config import DENSE, TICKET, LotteryConfig
from recipes.lottery_table import curve, headline, say_table
from recipes.reporting import say, speed
from recipes.set_config import Images, read_batches, read_images
from recipes.set_mnist import references, score

MASKS, START = "masks.safetensors", "start.safetensors"
"""Files of masks, in every checkpoint, and of the weights that tickets begin with, in the dense run."""

FREE = {"rounds", "num_seeds", "branches", "num_threads", "device", "eval_every", "save_every", "log_every",
        "keep_checkpoints"}  # fmt: skip
"""Flags that may differ in a resumed search: they change no network that is finished."""


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


class LotteryJob(frame.Job):
    """One network of a search, and where it is the dense one, the whole search.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        images: Data already at hand; by default those that the flags name.
        place: Where the network stands; by default it is the dense one.
    """

    config: LotteryConfig

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
        self.levels = [self.place.masks]
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

    def fractions(self) -> dict[str, float]:
        """Shares that a round removes of some parameters, which are pruned by themselves."""
        return {}

    def extra_records(self) -> dict[str, Tensor]:
        """Further arrays ``final_...`` of the search, for pictures; ``self.levels`` has the masks."""
        return {}

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
            return [KeepState(self._folder / START, step), self._enforce]
        return [self._enforce] if start is None else [Rewind(start, step), self._enforce]

    def extras(self) -> tuple[Callable[[Path], None], ...]:
        return (lambda folder: self.place.masks.save(folder / MASKS),)

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        return score(model, self.data, self.data.validation)

    def score(self, state: TrainState) -> dict:
        """All levels of this seed, then those of the others."""
        if self.place.branch != DENSE:
            return {}
        if state.accelerator.is_main_process:
            _ = self.images.logistic  # once, before networks are timed
        levels = self._search()
        seeds = range(self.config.seed + 1, self.config.seed + self.config.num_seeds)
        others = []
        for seed in seeds:
            say(f"\nseed {seed}")
            data = {"images": self.images}
            others.append(self.train_beside(f"seed-{seed}", data=data, seed=seed, num_seeds=1))
        return {"levels": levels, "seeds": others}

    def final_records(self, state: TrainState) -> dict[str, Tensor]:
        return self.extra_records() if self.place.branch == DENSE else {}

    def conclude(self, state: TrainState) -> dict:
        self.model.eval()
        result = self._conclude(state)
        if self.place.branch == DENSE:
            networks = [result, *self.scored["levels"]]
            result["networks"] = [_summary(network) for network in networks]
            for other in self.scored["seeds"]:
                result["networks"] += other["networks"]
            result["metrics"] |= headline(result["networks"])
        return result | references(self.images)

    def report(self, result: dict) -> None:
        if self.place.branch == DENSE:
            say_table(result)
            say(f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_mb']:,.0f} MB")
        else:
            say(f"{self.place.branch}: test accuracy {100 * result['metrics']['accuracy']:.2f} %, "
                f"{result['outside_mask']} entries outside the mask")  # fmt: skip

    @classmethod
    def evaluate(cls, config: LotteryConfig, recipe: str) -> None:
        """Score and audit all networks of a search again, from their checkpoints."""
        job, run_dir = cls(config, recipe), Path(config.evaluate)
        folders = [run_dir, *sorted(run_dir.glob("seed-*"))]
        paths = [path for folder in folders for path in (folder, *sorted(folder.glob("level-*")))]
        networks = [job.score_again(path) for path in paths if (path / "result.json").is_file()]
        if not networks:
            raise CheckpointError("no network is finished", run_dir)
        say_table({"metrics": {"curve": curve(networks)}, "networks": networks} | references(job.images))

    def score_again(self, run_dir: Path) -> dict:
        """The summary of a finished network, scored and audited from the files of its checkpoint."""
        result, step = checkpoint.read_json(run_dir / "result.json"), _newest(run_dir)
        checkpoint.restore(step, model=self.model)
        masks = Masks.load(step / MASKS)
        require_enforced(masks, self.model)
        self.model.eval()
        found = score(self.model, self.data, self.data.test)
        again = {"metrics": found, "layers": masks.counts, "outside_mask": 0}
        return _summary(result | again)

    @property
    def _folder(self) -> Path:
        return Path(self.config.out_dir) / self.config.run_name

    def _conclude(self, state: TrainState) -> dict:
        """What is known of this network alone."""
        masks, data = self.place.masks, self.data
        outside = masks.outside(self.model, state.optimizer)
        metrics = score(self.model, data, data.test)
        metrics |= {"test_accuracy": metrics["accuracy"], "images_per_second": speed(state.run_dir)}
        return {
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

    def _search(self) -> list[dict]:
        """Train every branch of every level of this seed; their results."""
        masks, source, results = self.place.masks, self._folder, []
        began, count = time.perf_counter(), self.config.rounds * len(self.config.branches)
        for level in range(1, self.config.rounds + 1):
            masks = self._cut(masks, source)
            self.levels.append(masks)
            for branch in sorted(self.config.branches, key=lambda branch: branch != TICKET):
                done = len(results)
                left = (time.perf_counter() - began) / max(1, done) * (count - done) / 60
                hint = f"; about {math.ceil(left)} min left of this seed" if done else ""
                share = 100 * masks.remaining / masks.total
                say(f"\nlevel {level} of {self.config.rounds}, {branch}: {masks.remaining:,} weights, "
                    f"{share:.2f} %{hint}")  # fmt: skip
                results.append(self._train(self._place(level, branch, masks)))
            source = self._folder / Place(level, TICKET, masks).name
        return results

    def _place(self, level: int, branch: str, masks: Masks) -> Place:
        kept = masks.random(self.config.seed) if branch == "random" else masks
        return Place(level, branch, kept, None if branch == "reinit" else self._folder / START)

    def _cut(self, masks: Masks, source: Path) -> Masks:
        """What is left of the network of a run after another round of pruning."""
        model = copy.deepcopy(self.model)
        checkpoint.restore(_newest(source), model=model)
        share = self.config.share_cut()
        return masks.prune(model, share, scope=self.config.scope, fractions=self.fractions())

    def _train(self, place: Place) -> dict:
        """The result of one network, of an earlier time if it was finished."""
        path = self._folder / place.name
        if (path / "result.json").is_file():
            different = [n for n in changed(from_run(type(self.config), path), self.config) if n not in FREE]
            if different:
                what = f"there is a network with other settings: {', '.join(different)}"
                raise ConfigError(what, path, "the same settings, --overwrite or another --run_name")
            return checkpoint.read_json(path / "result.json")
        return self.train_beside(place.name, data={"images": self.images, "place": place})


def _newest(run_dir: Path) -> Path:
    step = checkpoint.latest(run_dir)
    if step is None:
        raise CheckpointError("no checkpoint here", run_dir, "a network that was trained")
    return step


def _summary(result: dict) -> dict:
    """What a search keeps of one network."""
    keys = ("seed", "level", "branch", "weights", "total", "layers", "outside_mask", "validation")
    return {key: result[key] for key in keys} | {"accuracy": result["metrics"]["accuracy"]}
