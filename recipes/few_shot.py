"""Learn characters never seen before from one or five drawings, by a memory that lasts one episode.

``python -m recipes.few_shot --data_dir FOLDER`` with Omniglot in it, or ``python -m recipes.few_shot`` with
the letters of matplotlib's fonts, which trains on Latin and is scored on other scripts.

A small encoder embeds drawings; those to learn from are written into slots, key and label, and those to tell
read the labels of slots that are near. In the same run a prototypical network with the same encoder and the
same training is its baseline, beside nearest neighbours of raw pixels and chance. Nothing is chosen on the
characters that are scored: the weights after the last step count.
"""

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from graphmoe.data.few_shot import Characters, pixel_neighbours
from graphmoe.errors import ConfigError
from graphmoe.models import MemoryTransformer, PrototypicalNetwork, load
from graphmoe.models.memory_transformer import FewShotModel
from graphmoe.train.loop import TrainState
from recipes.few_shot_config import FewShotConfig, read_characters
from recipes.few_shot_scores import chance, embed, episode_records, reading, score, spread
from recipes.frame import Job
from recipes.frame import main as run
from recipes.reporting import say

MODELS = {"memory": MemoryTransformer, "prototypes": PrototypicalNetwork}
PIXEL_EPISODES = 2000
"""Most episodes that raw pixels have to tell."""
PROTOTYPES = "prototypes"
"""Folder of the baseline's run inside that of the memory."""


class FewShotJob(Job):
    """A few-shot classifier, characters to train it on, and others to score it on.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        characters: Those to train on and those to score, if they are at hand.
    """

    unit = "image"

    def __init__(
        self, config: FewShotConfig, recipe: str, *, characters: tuple[Characters, Characters] | None = None
    ):
        super().__init__(config, recipe)
        self.train, self.test = read_characters(config) if characters is None else characters
        self.episodes = config.training_episodes(self.train)
        for _, ways, shots in config.grid():
            config.episodes_of(self.test, ways, shots)  # says so now if there are too few
        self.dataset = self.train.name
        self.fingerprint = {"train": self.train.fingerprint, "test": self.test.fingerprint}
        self.model = MODELS[config.model](config.architecture())
        say(f"{config.model} on {self.dataset}: {self.train.describe()}; held out: {self.test.describe()}")

    def batch(self, index: int, size: int, slots: slice) -> dict[str, Tensor]:
        return self.episodes.batch(index, size, slots)

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        embeddings = embed(model, self.test)
        count, figures = self.config.eval_episodes, {}
        for name, ways, shots in self.config.grid():
            drawn = self.config.episodes_of(self.test, ways, shots)
            figures[f"accuracy_{name}"] = score(model, embeddings, drawn, count).mean().item()
        return {"accuracy": next(iter(figures.values()))} | figures

    def score(self, state: TrainState) -> dict:
        """The baseline's result, which all processes train for."""
        if self.config.model == PROTOTYPES or not self.config.compare:
            return {}
        data = {"characters": (self.train, self.test)}
        return self.train_beside(PROTOTYPES, data=data, model=PROTOTYPES)

    def final_records(self, state: TrainState) -> dict[str, Tensor]:
        if not isinstance(self.model, MemoryTransformer):
            return {}
        ways, shots = min(self.config.ways), max(self.config.shots)
        drawn = self.config.episodes_of(self.test, ways, shots)
        return episode_records(self.model, self.test, drawn, views=self.config.views)

    def conclude(self, state: TrainState) -> dict:
        result = scores(self.config, self.model, self.test)
        if self.scored:
            name = {"name": "prototypical network"}
            result["baseline"] = name | self.scored["metrics"]
            result["baseline_error"] = self.scored["standard_error"]
        else:
            result["baseline"] = dict(result["pixels"])
        if isinstance(self.model, MemoryTransformer):
            drawn = self.config.episodes_of(self.test, min(self.config.ways), max(self.config.shots))
            embeddings = embed(self.model, self.test, views=self.config.views)
            result["memory"] = reading(self.model, embeddings, drawn)
        return result | {"held_out": {"characters": len(self.test), "seed": self.config.split_seed}}

    def report(self, result: dict) -> None:
        table(result, self.config.model)
        if "memory" in result:
            say(
                "attention to slots of the right character {right:.3f} (uniform {right_uniform:.3f}), "
                "entropy {entropy:.2f} bits (uniform {entropy_uniform:.2f})".format(**result["memory"])
            )
        say(f"{result['seconds']:.0f} s in all, peak memory {result['peak_rss_mb']:,.0f} MB")

    @classmethod
    def evaluate(cls, config: FewShotConfig, recipe: str) -> None:
        model = load(config.evaluate)
        if not isinstance(model, FewShotModel):
            raise ConfigError(
                "no few-shot model", config.evaluate, "a run of this recipe", type(model).__name__
            )
        table(scores(config, model, read_characters(config)[1]), config.model)


def scores(config: FewShotConfig, model: FewShotModel, test: Characters) -> dict[str, dict]:
    """Mean accuracy over episodes and its standard error, of the model and of raw pixels, beside chance."""
    parts: dict[str, dict] = {key: {} for key in ("metrics", "standard_error", "pixels", "chance")}
    parts["pixels"]["name"] = "nearest pixels"
    embeddings = embed(model, test, views=config.views)
    for name, ways, shots in config.grid():
        key, count = f"accuracy_{name}", max(1, config.episodes * 5 // ways)
        drawn = config.episodes_of(test, ways, shots)
        right = score(model, embeddings, drawn, count)
        parts["metrics"][key], parts["standard_error"][key] = spread(right)
        parts["pixels"][key] = float(pixel_neighbours(drawn, range(min(count, PIXEL_EPISODES))).mean())
        parts["chance"][key] = chance(ways)
    return parts


def table(result: dict, name: str) -> None:
    """Say the accuracy of each kind of episode, beside the baselines and chance."""
    kinds = list(result["metrics"])
    say(f"{'accuracy, %':>22} " + " ".join(f"{kind.removeprefix('accuracy_'):>14}" for kind in kinds))
    rows = {
        name: "metrics",
        "prototypical network": "baseline",
        "nearest pixels": "pixels",
        "chance": "chance",
    }
    errors = {"metrics": "standard_error", "baseline": "baseline_error"}
    for title, part in rows.items():
        if part not in result or (part == "baseline" and "baseline_error" not in result):
            continue
        cells = [f"{100 * result[part][kind]:.2f}" for kind in kinds]
        if part in errors:
            error = result[errors[part]]
            cells = [f"{cell} ± {100 * error[kind]:.2f}" for cell, kind in zip(cells, kinds, strict=True)]
        say(f"{title:>22} " + " ".join(f"{cell:>14}" for cell in cells))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    about = __doc__.splitlines()[0]
    return run(FewShotConfig, argv, recipe="few_shot", description=about, job=FewShotJob)


if __name__ == "__main__":
    sys.exit(main())
