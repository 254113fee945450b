"""Levels of sparsity: a network is trained, pruned, rewound and trained again, beside its controls.

The run of the dense network holds those of all levels, a folder each, and those of further seeds. What is
finished is not trained again when the run is resumed.
"""

import copy
import math
import time
from pathlib import Path

from torch import Tensor

from graphmoe import checkpoint
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.train.config import changed, from_run
from graphmoe.train.loop import TrainState
from graphmoe.train.lottery import Masks, require_enforced
from recipes.lottery_config import DENSE, TICKET, LotteryConfig
from recipes.lottery_network import MASKS, START, NetworkJob, Place, summary
from recipes.lottery_table import curve, headline, say_table
from recipes.reporting import say
from recipes.set_mnist import references, score

FREE = {"rounds", "num_seeds", "branches", "num_threads", "device", "eval_every", "save_every", "log_every",
        "keep_checkpoints"}  # fmt: skip
"""Flags that may differ in a resumed search: they change no network that is finished."""


class LotteryJob(NetworkJob):
    """A network of a search, and where it is the dense one, the whole search.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        options: Further arguments of :class:`~recipes.lottery_network.NetworkJob`.

    Attributes:
        levels: Masks of the tickets of this seed, by level.
    """

    def __init__(self, config: LotteryConfig, recipe: str, **options):
        super().__init__(config, recipe, **options)
        self.levels = [self.place.masks]

    def fractions(self) -> dict[str, float]:
        """Shares that a round removes of some parameters, which are pruned by themselves."""
        return {}

    def extra_records(self) -> dict[str, Tensor]:
        """Further arrays ``final_...`` of the search, for pictures; ``self.levels`` has the masks."""
        return {}

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
        result = super().conclude(state)
        if self.place.branch == DENSE:
            result["networks"] = [summary(network) for network in (result, *self.scored["levels"])]
            for other in self.scored["seeds"]:
                result["networks"] += other["networks"]
            result["metrics"] |= headline(result["networks"])
        return result

    def report(self, result: dict) -> None:
        if self.place.branch != DENSE:
            super().report(result)
            return
        say_table(result)
        say(f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_mb']:,.0f} MB")

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
        return summary(result | again)

    def _search(self) -> list[dict]:
        """Train every branch of every level of this seed; their results."""
        masks, source, results = self.place.masks, self.folder, []
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
            source = self.folder / Place(level, TICKET, masks).name
        return results

    def _place(self, level: int, branch: str, masks: Masks) -> Place:
        kept = masks.random(self.config.seed) if branch == "random" else masks
        return Place(level, branch, kept, None if branch == "reinit" else self.folder / START)

    def _cut(self, masks: Masks, source: Path) -> Masks:
        """What is left of the network of a run after another round of pruning."""
        model = copy.deepcopy(self.model)
        checkpoint.restore(_newest(source), model=model)
        share = self.config.share_cut()
        return masks.prune(model, share, scope=self.config.scope, fractions=self.fractions())

    def _train(self, place: Place) -> dict:
        """The result of one network, of an earlier time if it was finished."""
        path = self.folder / place.name
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
