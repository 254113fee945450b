"""What the language-model recipes share: flags, corpus, model, training, scores and pictures."""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from graphmoe import checkpoint, visualize
from graphmoe.data import Corpus, TokenWindows, load_text, unigram_loss
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM, load
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, changed, exit_code, flag, from_run, open_run, parse, to_yaml
from graphmoe.train.evaluate import mean_loss
from graphmoe.train.loop import Every, fit, reseed

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

    max_steps: int = flag(700, "optimiser steps to train for")
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
        loss = mean_loss(model, held_out.sequential(), batch_size=config.batch_size)
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
            "sample": sample_text(config, model, corpus),
        } | ghost_steps(run_dir)
        result["seconds"] = time.perf_counter() - began
        checkpoint.write_json(run_dir / "result.json", result)
        visualize(run_dir, out=run_dir)
    report(result, run_dir)
    return run_dir


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
    records, log = on.RecordLog(facts), on.MetricsLog(run_dir, dtype="bf16" if config.bf16 else "fp32")
    some = held_out.sequential(config.eval_windows)
    check = on.Evaluate(lambda m: scores(corpus, mean_loss(m, some, batch_size=config.batch_size)), log)
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


def scores(corpus: Corpus, loss: float) -> dict[str, float | None]:
    """A loss in nats per token in the three units people use."""
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": corpus.bits_per_byte(loss)}


def speed(run_dir: Path) -> float:
    """Median training speed of a run, tokens per second."""
    rows = [row["tokens_per_second"] for row in checkpoint.read(run_dir).metrics if row["kind"] == "train"]
    return sorted(rows)[len(rows) // 2]


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def sample_text(config: LanguageModelConfig, model: nn.Module, corpus: Corpus) -> str | None:
    """Continue ``--sample``, or the beginning of a held-out document; a bar marks where the model began."""
    if corpus.tokenizer is None:
        return None
    text = config.sample or corpus.tokenizer.decode(corpus.held_out[:12].tolist())
    ids = corpus.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    reseed(config.seed, 0)
    out = model.eval().generate(
        ids, max_new_tokens=config.sample_tokens, do_sample=True, temperature=0.8, top_k=50,
        pad_token_id=corpus.tokenizer.eos_token_id,
    )  # fmt: skip
    return f"{text}|{corpus.tokenizer.decode(out[0, ids.size(1) :].tolist())}"


def ghost_steps(run_dir: Path) -> dict[str, list[dict]]:
    """When each ghost began to wake and when it was active, from the run's records.

    Steps are those of the record in which the phase is first seen.
    """
    records = checkpoint.read(run_dir).records
    if "ghost_phase" not in records:
        return {}
    phase, steps = records["ghost_phase"], records["step"]  # [S, L, G], [S]
    rows = []
    for layer in range(phase.shape[1]):
        for ghost in range(phase.shape[2]):
            seen = [steps[phase[:, layer, ghost] >= value] for value in (1, 2)]
            first = [int(found[0]) if len(found) else None for found in seen]
            rows.append({"layer": layer, "ghost": ghost, "activating": first[0], "active": first[1]})
    return {"ghosts": rows}


def report(result: dict, run_dir: Path) -> None:
    """Print the headline figures of a run, each beside its baseline and its chance level."""
    say(f"{'held-out':>16} {'model':>10} {'unigram':>10} {'chance':>10}")
    for name in ("bits_per_byte", "perplexity", "loss"):
        values = [result[part].get(name) for part in ("metrics", "baseline", "chance")]
        say(f"{name:>16} " + " ".join(f"{'-':>10}" if v is None else f"{v:>10.3f}" for v in values))
    if result["metrics"]["bits_per_byte"] is not None:
        below = 1 - result["metrics"]["bits_per_byte"] / result["baseline"]["bits_per_byte"]
        word = "fewer" if below >= 0 else "MORE"
        say(f"{abs(100 * below):.1f} % {word} bits per byte than the unigram model")
    for row in result.get("ghosts", ()):
        if row["activating"] is not None:
            active = "not yet active" if row["active"] is None else f"active at {row['active']}"
            name = f"layer {row['layer']}, ghost {row['ghost']}"
            say(f"{name}: dormant until step {row['activating']}, then activating, {active}")
    say(
        f"{result['seconds']:.0f} s in all, {result['metrics']['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_rss_mb']:,.0f} MB"
    )
    if result["sample"] is not None:
        say(f"sample: {result['sample']}")
    say(f"checkpoint, plots and report.html: {run_dir}")


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
        say(sample_text(config, model, corpus) or "no tokenizer, no sample")
        return
    windows = TokenWindows(corpus.held_out, config.seq_len)
    loss = mean_loss(model, windows.sequential(), batch_size=config.batch_size)
    rows = {
        "model": scores(corpus, loss),
        "unigram": scores(corpus, unigram_loss(corpus)),
        "chance": scores(corpus, math.log(corpus.vocab_size)),
    }
    for name, row in rows.items():
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items() if value is not None))


def say(text: str) -> None:
    """Print a line to the terminal."""
    print(text, flush=True)
