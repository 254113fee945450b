"""What the recipes that classify texts share: training, scores, routing and pictures of one model."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from graphmoe import checkpoint, visualize
from graphmoe.data.labelled_batches import LabelledBatch
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.models import GraphMoEForSequenceClassification, load
from graphmoe.models.cost import mean_flops
from graphmoe.train import callbacks as on
from graphmoe.train.classify import answers, routing_summary, score_texts
from graphmoe.train.config import exit_code, open_run, parse
from graphmoe.train.logs import RecordLog
from graphmoe.train.loop import Every, fit
from graphmoe.train.ranks import from_main, launched_rank, leave, make_accelerator, require_equal, together
from graphmoe.train.routing import RouterBalance
from graphmoe.train.tracking import TrackedLog, start_tracker
from recipes import comparison
from recipes.classification_config import ClassifierConfig, EncodedText, build_model, read_texts
from recipes.language_model import prepare
from recipes.reporting import peak_rss_mb, say, speed

EVAL_BATCH = 64
"""Texts scored at once."""


def main(config_class: type, argv: Sequence[str] | None, *, recipe: str, description: str) -> int:
    """Run a recipe's command line and return its exit code."""
    transformers_logging.disable_progress_bar()

    def command(argv: Sequence[str] | None) -> None:
        config = parse(config_class, argv, prog=f"python -m recipes.{recipe}", description=description)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if config.evaluate is None:
            train(config, recipe)
        elif launched_rank() == 0:
            evaluate(config)

    code = exit_code(command, argv)
    leave()
    return code


def train(
    config: ClassifierConfig, recipe: str, *, texts: EncodedText | None = None, pictures: bool = True
) -> dict:
    """Train, score and draw one classifier; returns its result.

    Of the checkpoints that are kept, the one with the least validation loss is scored on the test part, on
    which nothing is chosen. Under a launcher such as torchrun all its processes call this.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        texts: Data already at hand; by default those that the flags name.
        pictures: Whether to draw plots and the report.

    Returns:
        What stands in ``result.json``; nothing in processes other than the main one.
    """
    began = time.perf_counter()
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with together(accelerator):
        if main:
            open_run(config, dry=True)
    with together(accelerator):
        if texts is None:
            texts = read_texts(config)
            say(f"texts: {texts.describe()}")
        model = build_model(config, texts)
    require_equal(accelerator, "texts", texts.fingerprint)
    size = {
        "params_total": sum(p.numel() for p in model.parameters()),
        "params_active": model.num_active_parameters(),
        "flops_per_token": mean_flops(model, texts.lengths),
    }
    run_dir = Path(config.out_dir) / config.run_name
    with ExitStack() as opened:
        start, result = None, {}
        with together(accelerator):
            if main:
                open_run(config)
                opened.enter_context(checkpoint.RunLock(run_dir))
                start = prepare(config, recipe, run_dir, texts)
                start_tracker(accelerator, config)
        start = from_main(accelerator, start.name if start else "")
        counts = "{params_total:,} parameters, {params_active:,} active per token".format(**size)
        say(f"model: {counts}; run: {run_dir}")
        callbacks, records = hooks(config, recipe, run_dir, model, texts)
        batches = texts.batches("train", config.seed)
        state = fit(
            model,
            lambda index, count, slots: classifier_batch(batches.batch(index, count, slots)),
            config,
            run_dir,
            callbacks=callbacks,
            resume_from=run_dir / start if start else None,
            accelerator=accelerator,
        )
        with together(accelerator):
            if main:
                best, validation = best_checkpoint(run_dir)
                chosen = load(best).to(accelerator.device)
                losses, right, routes = answers(chosen, texts.batches("test").sequential(EVAL_BATCH))
                metrics = {"accuracy": right.double().mean().item(), "loss": losses.mean().item()}
                metrics["tokens_per_second"] = speed(run_dir)
                result = {"recipe": recipe, "metrics": metrics, "validation": validation}
                result |= references(texts) | size
                result |= {
                    "seconds": 0.0,
                    "steps": state.step,
                    "best_step": validation["step"],
                    "peak_rss_mb": peak_rss_mb(),
                    "seed": config.seed,
                    "dataset": texts.data.name,
                    "test_texts": len(right),
                    "device": str(accelerator.device),
                    "processes": accelerator.num_processes,
                    "versions": checkpoint.versions(),
                }
                if routes:
                    result["experts"] = routing_summary(chosen, routes) | records.summary()
                result["seconds"] = time.perf_counter() - began
                checkpoint.write_json(run_dir / "result.json", result)
                if pictures:
                    visualize(run_dir, out=run_dir)
    if main:
        report(result)
        say(f"checkpoint{', plots and report.html' if pictures else ''}: {run_dir}")
    return result


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


def hooks(
    config: ClassifierConfig,
    recipe: str,
    run_dir: Path,
    model: GraphMoEForSequenceClassification,
    texts: EncodedText,
) -> tuple[list[on.Callback], RecordLog]:
    """The callbacks of a run, in the order in which they act after a step; the records among them."""
    facts = {"recipe": recipe, "k": config.top_k, "num_experts": config.num_experts}
    records = RecordLog(facts | {"coupling": "none", "num_ghosts": 0})
    log = TrackedLog(run_dir, dtype="bf16" if config.bf16 else "fp32")
    held = texts.batches("validation")
    check = on.Evaluate(lambda m: score_texts(m, held.sequential(EVAL_BATCH)), log)
    save = on.Save(
        records=records,
        extras=(texts.tokenizer.save_pretrained,),
        keep=config.keep_checkpoints,
        facts={"corpus": texts.fingerprint},
    )
    callbacks = [
        RouterBalance(model),
        Every(config.log_every, on.Unsharded(records)),
        Every(config.log_every, log),
        Every(config.eval_every, check),
        Every(config.save_every, save),
        on.Progress(evaluation=check),
    ]
    return callbacks, records


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
