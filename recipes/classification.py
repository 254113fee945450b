"""What the recipes that classify texts share: training, scores, routing and pictures of one model."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graphmoe import checkpoint
from graphmoe.data.labelled_batches import LabelledBatch
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.models import load
from graphmoe.models.cost import mean_flops
from graphmoe.train.classify import answers, routing_summary, score_texts
from graphmoe.train.loop import TrainState
from recipes import comparison, frame
from recipes.classification_config import ClassifierConfig, EncodedText, build_model, read_texts
from recipes.reporting import say, speed

EVAL_BATCH = 64
"""Texts scored at once."""


def main(config_class: type, argv: Sequence[str] | None, *, recipe: str, description: str) -> int:
    """Run a recipe's command line and return its exit code."""
    return frame.main(config_class, argv, recipe=recipe, description=description, job=ClassifierJob)


def train(
    config: ClassifierConfig, recipe: str, *, texts: EncodedText | None = None, pictures: bool = True
) -> dict:
    """Train, score and draw one classifier, see :func:`recipes.frame.train`.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        texts: Data already at hand; by default those that the flags name.
        pictures: Whether to draw plots and the report.
    """
    return frame.train(ClassifierJob, config, recipe, pictures=pictures, texts=texts)


class ClassifierJob(frame.Job):
    """A classifier of texts.

    Of the checkpoints that are kept, the one with the least validation loss is scored on the test part, on
    which nothing is chosen.
    """

    def __init__(self, config: ClassifierConfig, recipe: str, *, texts: EncodedText | None = None):
        super().__init__(config, recipe)
        if texts is None:
            texts = read_texts(config)
            say(f"texts: {texts.describe()}")
        self.texts, self.dataset, self.fingerprint = texts, texts.data.name, texts.fingerprint
        self.model = build_model(config, texts)
        self.train_part = texts.batches("train", config.seed)
        self.validation_part = texts.batches("validation")

    def size(self) -> dict[str, int]:
        return super().size() | {"flops_per_token": mean_flops(self.model, self.texts.lengths)}

    def batch(self, index: int, size: int, slots: slice) -> dict:
        return classifier_batch(self.train_part.batch(index, size, slots))

    def facts(self) -> dict[str, object]:
        config = self.config
        return {"k": config.top_k, "num_experts": config.num_experts, "coupling": "none", "num_ghosts": 0}

    def extras(self) -> tuple:
        return (self.texts.tokenizer.save_pretrained,)

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        return score_texts(model, self.validation_part.sequential(EVAL_BATCH))

    def conclude(self, state: TrainState) -> dict:
        best, validation = best_checkpoint(state.run_dir)
        chosen = load(best).to(state.accelerator.device)
        losses, right, routes = answers(chosen, self.texts.batches("test").sequential(EVAL_BATCH))
        metrics = {"accuracy": right.double().mean().item(), "loss": losses.mean().item()}
        metrics["tokens_per_second"] = speed(state.run_dir)
        result = {"metrics": metrics, "validation": validation} | references(self.texts)
        result |= {"best_step": validation["step"], "test_texts": len(right)}
        if routes:
            result["experts"] = routing_summary(chosen, routes) | self.records.summary()
        return result

    def report(self, result: dict) -> None:
        report(result)

    @classmethod
    def evaluate(cls, config: ClassifierConfig, recipe: str) -> None:
        evaluate(config)


def best_checkpoint(run_dir: Path) -> tuple[Path, dict[str, float]]:
    """The kept checkpoint with the least validation loss, the earliest of equal ones; and its scores.

    Raises:
        CheckpointError: If there is none that was evaluated.
    """
    rows = {row["step"]: row for row in checkpoint.read(run_dir).metrics if row["kind"] == "eval"}
    kept = {int(path.name.removeprefix("step-")): path for path in run_dir.glob("step-*") if path.is_dir()}
    steps = sorted(set(rows) & set(kept), key=lambda step: (rows[step]["loss"], step))
    if not steps:
        raise CheckpointError("no checkpoint here that was evaluated", run_dir, "a finished run")
    names = ("step", "loss", "accuracy")
    return kept[steps[0]], {name: rows[steps[0]][name] for name in names}


def references(texts: EncodedText) -> dict[str, dict]:
    """What anybody reaches on the test part: TF-IDF, the most frequent class, a uniform guess."""
    classes = texts.data.num_classes
    return {
        "baseline": dict(texts.tfidf),
        "majority": {"name": "majority class", "accuracy": texts.data.majority()},
        "chance": {"accuracy": 1 / classes, "loss": math.log(classes)},
    }


def classifier_batch(batch: LabelledBatch) -> dict[str, torch.Tensor | bool]:
    """Arguments of a training forward pass."""
    ids, mask, labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "output_records": True}


def report(result: dict) -> None:
    """Print the accuracy of a run beside what anybody reaches."""
    rows = [
        ("model", result["metrics"]),
        *((result[key].get("name", key), result[key]) for key in REFERENCES),
    ]
    for name, row in rows:
        text = f"test accuracy of {name}: {row['accuracy']:.4f}"
        say(text + (f", loss {row['loss']:.4f}" if row.get("loss") is not None else ""))
    validation = result["validation"]
    scores = f"accuracy {validation['accuracy']:.4f}, loss {validation['loss']:.4f}"
    say(f"chosen by its validation loss: step {validation['step']} of {result['steps']}, {scores}")
    say(
        f"{result['seconds']:.0f} s in all, {result['metrics']['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_rss_mb']:,.0f} MB"
    )


REFERENCES = ("baseline", "majority", "chance")
"""Parts of a result that are no model of this library."""


def evaluate(config: ClassifierConfig) -> None:
    """Score a finished run on its own test texts, without training."""
    model, texts = load(best_checkpoint(Path(config.evaluate))[0]), read_texts(config)
    if tuple(model.config.id2label.values()) != texts.data.class_names:
        known = list(model.config.id2label.values())
        raise ConfigError("texts of other classes", "--dataset", known, list(texts.data.class_names))
    rows = {"model": score_texts(model, texts.batches("test").sequential(EVAL_BATCH))}
    rows |= {row.get("name", key): row for key, row in references(texts).items()}
    for name, row in rows.items():
        figures = {key: row[key] for key in ("accuracy", "loss") if key in row}
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))


def cost(config: ClassifierConfig, texts: EncodedText, equal: str) -> int:
    """What a token of these texts costs: active ``parameters``, or ``flops`` of a forward pass."""
    with torch.device("meta"):  # sizes without numbers
        model = build_model(config, texts)
    return model.num_active_parameters() if equal == "parameters" else mean_flops(model, texts.lengths)


TASK = comparison.Task(
    read=read_texts,
    divide=lambda texts, tuning: texts,  # they have a validation part of their own
    train=lambda config, recipe, texts: train(config, recipe, texts=texts, pictures=False),
    cost=cost,
    metric="accuracy",
    references=REFERENCES,
)
"""Tell the class of a text."""
