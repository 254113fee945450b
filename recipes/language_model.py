"""What the language-model recipes share: flags, corpus, model, training, scores and pictures."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from graphmoe import checkpoint, visualize
from graphmoe.data import Corpus, TokenWindows, load_text, unigram_loss
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEForCausalLM, load
from graphmoe.models.cost import forward_flops
from graphmoe.train import callbacks as on
from graphmoe.train.collaboration import probe_collaboration, probe_inference
from graphmoe.train.config import changed, exit_code, from_run, open_run, parse, to_yaml
from graphmoe.train.evaluate import expert_summary, mean_loss, probe_experts, window_losses
from graphmoe.train.logs import RecordLog
from graphmoe.train.loop import Every, TrainState, fit
from graphmoe.train.orthogonality import AdaptiveOrthogonality, OrthogonalityWarmup
from graphmoe.train.parallel import refuse_shards
from graphmoe.train.ranks import (
    from_main,
    launched_rank,
    leave,
    make_accelerator,
    mean_of_shares,
    require_equal,
    together,
)
from graphmoe.train.routing import RouterBalance, probe_balance
from graphmoe.train.tracking import TrackedLog, start_tracker
from recipes.language_model_config import LanguageModelConfig, build_model
from recipes.reporting import ghost_steps, peak_rss_mb, report, say, scores, speed
from recipes.sampling import encode_prompt, knobs, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

INFERENCE_TOKENS = 4096
"""Held-out tokens scored with each number of rounds and steps."""


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
    config: LanguageModelConfig,
    recipe: str,
    *,
    corpus: Corpus | None = None,
    validation: Corpus | None = None,
    pictures: bool = True,
) -> dict:
    """Train, score, sample and draw one run; returns its result.

    Under a launcher such as torchrun all its processes call this. The main one writes the run; what it
    cannot do, such as opening a run that exists, ends all of them.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        corpus: Data already at hand; by default those that the flags name.
        validation: Other held-out text that is scored too, for choosing between runs.
        pictures: Whether to draw plots and the report.

    Returns:
        What stands in ``result.json``; nothing in processes other than the main one.
    """
    began = time.perf_counter()
    refuse_shards(
        config.parallel,
        ghosts=config.num_ghosts > 0,
        weight_orthogonality=config.orthogonality_weight_coef > 0,
    )
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with together(accelerator):
        if main:
            open_run(config, dry=True)
    with together(accelerator):
        if corpus is None:
            corpus = read_corpus(config)
            say(f"corpus: {corpus.describe()}")
        if config.sample and config.sample_tokens and corpus.tokenizer is not None:
            encode_prompt(config, corpus, config.seq_len)  # one that is too long is found before training
        model = build_model(config, corpus)
        windows = TokenWindows(corpus.train, config.seq_len, seed=config.seed)
        held_out = TokenWindows(corpus.held_out, config.seq_len)
    require_equal(accelerator, "corpus", str(corpus.fingerprint))
    if config.epochs is not None:
        per_step = config.batch_size * config.gradient_accumulation_steps
        config = dataclasses.replace(config, max_steps=math.ceil(config.epochs * len(windows) / per_step))
    size = {
        "params_total": sum(p.numel() for p in model.parameters()),
        "params_active": model.num_active_parameters(),
        "flops_per_token": forward_flops(model, config.seq_len),
    }
    run_dir = Path(config.out_dir) / config.run_name
    with ExitStack() as opened:
        start, result = None, {}
        with together(accelerator):
            if main:
                open_run(config)
                opened.enter_context(checkpoint.RunLock(run_dir))
                start = prepare(config, recipe, run_dir, corpus)
                start_tracker(accelerator, config)
        start = from_main(accelerator, start.name if start else "")
        counts = "{params_total:,} parameters, {params_active:,} active per token".format(**size)
        say(f"model: {counts}; run: {run_dir}")
        callbacks, records, setup = hooks(config, recipe, run_dir, model, corpus, held_out, accelerator)
        state = fit(
            model,
            lambda index, size, slots: language_batch(windows.batch(index, size, slots)),
            config,
            run_dir,
            callbacks=callbacks,
            setup=setup,
            resume_from=run_dir / start if start else None,
            accelerator=accelerator,
        )
        final = held_out.sequential(config.final_windows)
        say(f"scoring {len(final):,} held-out sequences ...")
        score = partial(mean_of_shares, accelerator, partial(mean_loss, model))
        loss = score(final)
        other = None
        if validation is not None:
            other = score(
                TokenWindows(validation.held_out, config.seq_len).sequential(8 * config.eval_windows)
            )
        with together(accelerator):
            if main:
                # Slices of a model can be trained and scored by all ranks, but not taken apart by one.
                whole = load(run_dir) if accelerator.is_fsdp2 else model
                metrics = scores(corpus, loss) | {"tokens_per_second": speed(run_dir)}
                result = {"recipe": recipe, "metrics": metrics} | size
                result |= conclude(config, state, whole, corpus, held_out, records, thorough=pictures)
                if validation is not None:
                    result["validation"] = scores(validation, other)
                result["seconds"] = time.perf_counter() - began
                checkpoint.write_json(run_dir / "result.json", result)
                if pictures:
                    visualize(run_dir, out=run_dir)
    if main:
        report(result)
        say(f"checkpoint{', plots and report.html' if pictures else ''}: {run_dir}")
    return result


def conclude(
    config: LanguageModelConfig,
    state: TrainState,
    model: GraphMoEForCausalLM,
    corpus: Corpus,
    held_out: TokenWindows,
    records: RecordLog,
    *,
    thorough: bool = True,
) -> dict:
    """Take the experts of a trained model apart and continue a sample; the part of the result that is not
    the same for every model of this size and score. ``thorough``: score it with other numbers of rounds and
    steps too, which takes longer than the rest."""
    some = held_out.sequential(config.eval_windows)
    probe = probe_experts(model, some) | probe_collaboration(model, some)
    probe |= probe_balance(model, held_out.sequential(config.final_windows), batch_size=config.batch_size)
    if thorough:
        probe |= probe_inference(model, some, max_tokens=INFERENCE_TOKENS)
    records.write(state, model, final=probe)
    result = {
        "chance": scores(corpus, math.log(corpus.vocab_size)),
        "baseline": {"name": "unigram"} | scores(corpus, unigram_loss(corpus)),
        "seconds": 0.0,
        "steps": state.step,
        "peak_rss_mb": peak_rss_mb(),
        "seed": config.seed,
        "dataset": corpus.name,
        "device": str(state.accelerator.device),
        "processes": state.accelerator.num_processes,
        "versions": checkpoint.versions(),
        "sample": sample(config, model, corpus),
    } | ghost_steps(state.run_dir)
    if probe:
        result["experts"] = expert_summary(probe) | records.summary()
    return result


def read_corpus(config: LanguageModelConfig) -> Corpus:
    """The corpus that the flags name."""
    return load_text(
        config.dataset,
        data_dir=config.data_dir,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        held_out=config.held_out,
        seed=config.seed,
    )


def prepare(config: LanguageModelConfig, recipe: str, run_dir: Path, corpus: Corpus) -> Path | None:
    """Write the config of a new run, or find the checkpoint of a resumed one."""
    start = None
    if config.resume:
        start = checkpoint.latest(run_dir)
        different = changed(from_run(type(config), run_dir), config)
        if different:
            say(f"resuming with other settings than before: {', '.join(different)}")
        if start is not None:
            state = checkpoint.read_json(start / "state.json")
            if state.get("corpus") != corpus.fingerprint:
                say("resuming on other data than before: the corpus has changed")
            say(f"resuming from step {state['step']}")
    checkpoint.atomic_write_bytes(run_dir / "config.yaml", to_yaml(config, recipe))
    return start


def hooks(
    config: LanguageModelConfig,
    recipe: str,
    run_dir: Path,
    model: GraphMoEForCausalLM,
    corpus: Corpus,
    held_out: TokenWindows,
    accelerator: "Accelerator",
) -> tuple[list[on.Callback], RecordLog, Callable[[torch.optim.Optimizer], None]]:
    """The callbacks of a run, in the order in which they act after a step; the records among them;
    and what is to be done with the optimiser before the first step."""
    keys = ("coupling", "num_experts", "num_ghosts", "ghost_activation_threshold", "hyperedge_strategy")
    facts = {"recipe": recipe, "k": config.top_k} | {key: getattr(config, key) for key in keys}
    ghosts = on.GhostActivation(
        model,
        learning_rate=config.ghost_lr_schedule,
        peak=config.learning_rate,
        ghost_peak=config.ghost_learning_rate,
    )
    if config.orthogonality_adaptive:
        orthogonality = AdaptiveOrthogonality(
            config.orthogonality_schedule,
            max_steps=config.max_steps,
            warmup_steps=config.orthogonality_warmup_steps,
        )
    else:
        orthogonality = OrthogonalityWarmup(config.orthogonality_warmup_steps)
    records = RecordLog(facts, extras=[ghosts.figures])
    log = TrackedLog(run_dir, dtype="bf16" if config.bf16 else "fp32")
    some = held_out.sequential(config.eval_windows)
    check = on.Evaluate(
        lambda m: scores(corpus, mean_of_shares(accelerator, partial(mean_loss, m), some)), log
    )
    extras = () if corpus.tokenizer is None else (corpus.tokenizer.save_pretrained,)
    save = on.Save(
        records=records, extras=extras, keep=config.keep_checkpoints, facts={"corpus": corpus.fingerprint}
    )
    callbacks = [
        ghosts,
        RouterBalance(model),
        orthogonality,
        Every(config.log_every, on.Unsharded(records)),
        Every(config.log_every, log),
        Every(config.eval_every, check),
        Every(config.save_every, save),
        on.Progress(evaluation=check),
    ]
    return callbacks, records, ghosts.setup


def language_batch(windows: np.ndarray) -> dict[str, torch.Tensor | bool]:
    """Arguments of a training forward pass on token windows ``[n, T + 1]``."""
    ids = torch.from_numpy(windows)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    # transformers shifts labels itself unless it is given shifted ones.
    return {"input_ids": inputs, "labels": inputs, "shift_labels": targets, "output_records": True}


def evaluate(config: LanguageModelConfig) -> None:
    """Score a finished run on its own held-out documents, or continue ``--sample``, without training."""
    run_dir = Path(config.evaluate)
    model = load(run_dir)
    corpus = read_corpus(config)
    if model.config.vocab_size != corpus.vocab_size:
        raise ConfigError(
            "corpus of another vocabulary", "--dataset", model.config.vocab_size, corpus.vocab_size
        )
    if config.sample is not None:
        say(sample(config, model, corpus) or "no tokenizer, no sample")
        return
    windows = TokenWindows(corpus.held_out, config.seq_len)
    chosen = windows.sequential(config.final_windows)
    options = knobs(config)
    if options:
        say("with " + ", ".join(f"{name} {value}" for name, value in options.items()))
    loss = window_losses(model, chosen, **options).sum().item() / chosen[:, 1:].size
    rows = {
        "model": scores(corpus, loss),
        "unigram": scores(corpus, unigram_loss(corpus)),
        "chance": scores(corpus, math.log(corpus.vocab_size)),
    }
    for name, row in rows.items():
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items() if value is not None))
