"""What the language-model recipes share: flags, corpus, model, training, scores and pictures."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from graphmoe import checkpoint, visualize
from graphmoe.data import Corpus, TokenWindows, load_text, unigram_loss
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM, load
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, changed, exit_code, flag, from_run, open_run, parse, to_yaml
from graphmoe.train.evaluate import mean_loss
from graphmoe.train.logs import MetricsLog, RecordLog
from graphmoe.train.loop import Every, fit, reseed
from recipes.reporting import ghost_steps, peak_rss_mb, report, sample_text, say, scores, speed

# The words of the command line, where they differ from those of transformers and of layers.
_MODEL_WORDS = {
    "embed_dim": "hidden_size",
    "expert_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "seq_len": "max_position_embeddings",
    "top_k": "num_experts_per_tok",
}
_FLAGS = {word: name for name, word in _MODEL_WORDS.items()} | {
    "k": "top_k",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
}


@dataclass(kw_only=True)
class LanguageModelConfig(RunConfig):
    """Flags of every language-model recipe; a recipe overrides defaults."""

    max_steps: int = flag(560, "optimiser steps to train for")
    batch_size: int = flag(8, "sequences in a batch")
    learning_rate: float = flag(2e-3, "peak learning rate")
    embed_dim: int = flag(128, "channels of a token")
    num_layers: int = flag(4, "blocks")
    num_heads: int = flag(4, "attention heads")
    num_kv_heads: int | None = flag(None, "key and value heads; as many as --num_heads without it")
    expert_dim: int = flag(128, "channels inside one expert")
    num_experts: int = flag(6, "primary experts of a block; 1 is a dense model")
    top_k: int = flag(3, "experts a token")
    seq_len: int = flag(128, "tokens of a training sequence")
    dropout: float = flag(0.0, "dropout on residual branches")
    coupling: str = flag("none", "how the experts of a token talk: none, gnn or hyper")
    coupling_layers: int | None = flag(None, "rounds of coupling; 2 for gnn and 1 for hyper without it")
    hyperedge_strategy: str = flag("all_pairs", "all_pairs, all_triplets or all", aliases=["--hgnn_strategy"])
    num_ghosts: int = flag(0, "ghost experts of a block", aliases=["--ghost_num_ghost_experts"])
    ghost_activation_threshold: float = flag(0.01, "saturation above which a ghost wakes")
    ghost_rate: float = flag(0.01, "level that a waking ghost gains per optimiser step")
    ghost_window: int = flag(100, "optimiser steps that saturation averages over")
    router_aux_loss_coef: float = flag(0.01, "weight of the load-balancing loss")
    router_z_loss_coef: float = flag(0.001, "weight of the router z-loss")
    orthogonality_output_coef: float = flag(0.0, "weight of the orthogonality of mean expert outputs")
    orthogonality_weight_coef: float = flag(0.0, "weight of the orthogonality of expert weights")
    orthogonality_warmup_steps: int = flag(1000, "optimiser steps until orthogonality has full strength")
    tokenizer: str = flag("bpe", "bpe (trained on the corpus), bytes, or a pretrained tokenizer's name")
    vocab_size: int = flag(4096, "tokens of a trained vocabulary")
    held_out: float = flag(0.1, "fraction of the documents never trained on")
    eval_windows: int = flag(64, "held-out sequences scored while training; the end scores all")
    sample: str | None = flag(None, "text to continue, at the end of training or with --evaluate")
    sample_tokens: int = flag(96, "tokens of a sample")


def build_model(config: LanguageModelConfig, corpus: Corpus) -> GraphMoEForCausalLM:
    """The model of a config on a corpus; an error names the flag, not the model's word for it."""
    known = {field.name for field in dataclasses.fields(GraphMoEConfig)}
    settings = {_MODEL_WORDS.get(name, name): value for name, value in vars(config).items()}
    end = None if corpus.tokenizer is None else corpus.tokenizer.eos_token_id
    settings |= {"vocab_size": corpus.vocab_size, "eos_token_id": end, "bos_token_id": end}
    reseed(config.seed, 0)
    try:
        return GraphMoEForCausalLM(GraphMoEConfig(**{k: v for k, v in settings.items() if k in known}))
    except ConfigError as error:
        where = f"--{_FLAGS.get(error.where, error.where)}"
        raise ConfigError(error.what, where, error.expected, error.got) from None


def main(config_class: type, argv: Sequence[str] | None, *, recipe: str, description: str) -> int:
    """Run a recipe's command line and return its exit code."""
    transformers_logging.disable_progress_bar()

    def command(argv: Sequence[str] | None) -> None:
        config = parse(config_class, argv, prog=f"python -m recipes.{recipe}", description=description)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if config.evaluate is None:
            train(config, recipe)
        else:
            evaluate(config)

    return exit_code(command, argv)


def train(config: LanguageModelConfig, recipe: str) -> Path:
    """Train, score, sample and draw one run; returns its directory."""
    began = time.perf_counter()
    open_run(config, dry=True)
    corpus = read_corpus(config)
    say(f"corpus: {corpus.describe()}")
    model = build_model(config, corpus)
    windows = TokenWindows(corpus.train, config.seq_len, seed=config.seed)
    held_out = TokenWindows(corpus.held_out, config.seq_len)
    run_dir = open_run(config)
    with checkpoint.RunLock(run_dir):
        start = prepare(config, recipe, run_dir, corpus)
        total, active = sum(p.numel() for p in model.parameters()), model.num_active_parameters()
        say(f"model: {total:,} parameters, {active:,} active per token; run: {run_dir}")
        state = fit(
            model,
            lambda index, size, slots: language_batch(windows.batch(index, size, slots)),
            config,
            run_dir,
            resume_from=start,
            **hooks(config, recipe, run_dir, model, corpus, held_out),
        )
        say("scoring every held-out document ...")
        loss = mean_loss(model, held_out.sequential())
        result = {
            "recipe": recipe,
            "metrics": scores(corpus, loss) | {"tokens_per_second": speed(run_dir)},
            "chance": scores(corpus, math.log(corpus.vocab_size)),
            "baseline": {"name": "unigram"} | scores(corpus, unigram_loss(corpus)),
            "seconds": 0.0,
            "steps": state.step,
            "peak_rss_mb": peak_rss_mb(),
            "params_total": total,
            "params_active": active,
            "seed": config.seed,
            "dataset": corpus.name,
            "device": str(state.accelerator.device),
            "versions": checkpoint.versions(),
            "sample": sample(config, model, corpus),
        } | ghost_steps(run_dir)
        result["seconds"] = time.perf_counter() - began
        checkpoint.write_json(run_dir / "result.json", result)
        visualize(run_dir, out=run_dir)
    report(result, run_dir)
    return run_dir


def sample(config: LanguageModelConfig, model: GraphMoEForCausalLM, corpus: Corpus) -> str | None:
    """The sample that the flags ask for."""
    return sample_text(model, corpus, prompt=config.sample, num_tokens=config.sample_tokens, seed=config.seed)


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
) -> dict:
    """The callbacks of a run, in the order in which they act after a step."""
    keys = ("coupling", "num_experts", "num_ghosts", "ghost_activation_threshold", "hyperedge_strategy")
    facts = {"recipe": recipe, "k": config.top_k} | {key: getattr(config, key) for key in keys}
    records, log = RecordLog(facts), MetricsLog(run_dir, dtype="bf16" if config.bf16 else "fp32")
    some = held_out.sequential(config.eval_windows)
    check = on.Evaluate(lambda m: scores(corpus, mean_loss(m, some)), log)
    ghosts = on.GhostActivation(model)
    extras = () if corpus.tokenizer is None else (corpus.tokenizer.save_pretrained,)
    save = on.Save(
        records=records, extras=extras, keep=config.keep_checkpoints, facts={"corpus": corpus.fingerprint}
    )
    callbacks = [
        ghosts,
        on.OrthogonalityWarmup(config.orthogonality_warmup_steps),
        Every(config.log_every, records),
        Every(config.log_every, log),
        Every(config.eval_every, check),
        Every(config.save_every, save),
        on.Progress(evaluation=check),
    ]
    return {"callbacks": callbacks, "setup": ghosts.setup}


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
    loss = mean_loss(model, windows.sequential())
    rows = {
        "model": scores(corpus, loss),
        "unigram": scores(corpus, unigram_loss(corpus)),
        "chance": scores(corpus, math.log(corpus.vocab_size)),
    }
    for name, row in rows.items():
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items() if value is not None))
