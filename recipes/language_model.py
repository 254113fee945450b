"""What the language-model recipes share: flags, corpus, model, training, scores and pictures."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe.data import Corpus, TokenWindows, load_text, unigram_loss
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEForCausalLM, load
from graphmoe.models.cost import forward_flops
from graphmoe.train import callbacks as on
from graphmoe.train.collaboration import probe_collaboration, probe_inference
from graphmoe.train.evaluate import expert_summary, mean_loss, probe_experts, window_losses
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.memory import memory_summary, probe_memory
from graphmoe.train.orthogonality import AdaptiveOrthogonality, OrthogonalityWarmup
from graphmoe.train.parallel import refuse_shards
from graphmoe.train.ranks import mean_of_shares
from graphmoe.train.routing import RouterBalance, probe_balance
from recipes import frame
from recipes.language_model_config import LanguageModelConfig, build_model
from recipes.reporting import ghost_steps, report, say, scores, speed
from recipes.sampling import encode_prompt, knobs, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

INFERENCE_TOKENS = 4096
"""Held-out tokens scored with each number of rounds and steps."""


def main(config_class: type, argv: Sequence[str] | None, *, recipe: str, description: str) -> int:
    """Run a recipe's command line and return its exit code."""
    return frame.main(config_class, argv, recipe=recipe, description=description, job=LanguageModelJob)


def train(
    config: LanguageModelConfig,
    recipe: str,
    *,
    corpus: Corpus | None = None,
    validation: Corpus | None = None,
    pictures: bool = True,
) -> dict:
    """Train, score, sample and draw one run, see :func:`recipes.frame.train`.

    Args:
        config: The flags.
        recipe: Name that the run carries.
        corpus: Data already at hand; by default those that the flags name.
        validation: Other held-out text that is scored too, for choosing between runs.
        pictures: Whether to draw plots and the report, and to score the model with other numbers of rounds
            and steps too, which takes longer than the rest.
    """
    data = {"corpus": corpus, "validation": validation, "thorough": pictures}
    return frame.train(LanguageModelJob, config, recipe, pictures=pictures, **data)


class LanguageModelJob(frame.Job):
    """A language model: its corpus, its ghosts and its orthogonality, what its experts do, a sample."""

    def __init__(
        self,
        config: LanguageModelConfig,
        recipe: str,
        *,
        corpus: Corpus | None = None,
        validation: Corpus | None = None,
        thorough: bool = True,
    ):
        refuse_shards(
            config.parallel,
            ghosts=config.num_ghosts > 0,
            weight_orthogonality=config.orthogonality_weight_coef > 0,
        )
        if corpus is None:
            corpus = read_corpus(config)
            say(f"corpus: {corpus.describe()}")
        if config.sample and config.sample_tokens and corpus.tokenizer is not None:
            encode_prompt(config, corpus, config.seq_len)  # one that is too long is found before training
        self.model = build_model(config, corpus)
        self.windows = TokenWindows(corpus.train, config.seq_len, seed=config.seed)
        self.held_out = TokenWindows(corpus.held_out, config.seq_len)
        if config.epochs is not None:
            per_step = config.batch_size * config.gradient_accumulation_steps
            steps = math.ceil(config.epochs * len(self.windows) / per_step)
            config = dataclasses.replace(config, max_steps=steps)
        super().__init__(config, recipe)
        self.corpus, self.validation, self.thorough = corpus, validation, thorough
        self.dataset, self.fingerprint = corpus.name, corpus.fingerprint
        self.ghosts = on.GhostActivation(
            self.model,
            learning_rate=config.ghost_lr_schedule,
            peak=config.learning_rate,
            ghost_peak=config.ghost_learning_rate,
        )
        self.setup = self.ghosts.setup

    def size(self) -> dict[str, int]:
        return super().size() | {"flops_per_token": forward_flops(self.model, self.config.seq_len)}

    def batch(self, index: int, size: int, slots: slice) -> dict:
        return language_batch(self.windows.batch(index, size, slots))

    def facts(self) -> dict[str, object]:
        keys = ("coupling", "num_experts", "num_ghosts", "ghost_activation_threshold", "hyperedge_strategy")
        return {"k": self.config.top_k} | {key: getattr(self.config, key) for key in keys}

    def record_figures(self) -> Sequence:
        return [self.ghosts.figures]

    def movers(self) -> list[Callback]:
        config = self.config
        if config.orthogonality_adaptive:
            orthogonality = AdaptiveOrthogonality(
                config.orthogonality_schedule,
                max_steps=config.max_steps,
                warmup_steps=config.orthogonality_warmup_steps,
            )
        else:
            orthogonality = OrthogonalityWarmup(config.orthogonality_warmup_steps)
        return [self.ghosts, RouterBalance(self.model), orthogonality]

    def extras(self) -> tuple:
        return () if self.corpus.tokenizer is None else (self.corpus.tokenizer.save_pretrained,)

    def hooks(self, run_dir: Path, accelerator: "Accelerator") -> list[Callback]:
        self.accelerator = accelerator  # all its processes score a share of the held-out text
        return super().hooks(run_dir, accelerator)

    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        return scores(self.corpus, self._loss(model, self.held_out.sequential(self.config.eval_windows)))

    def score(self, state: TrainState) -> dict[str, float | None]:
        config = self.config
        final = self.held_out.sequential(config.final_windows)
        say(f"scoring {len(final):,} held-out sequences ...")
        found = {"loss": self._loss(self.model, final)}
        if self.validation is not None:
            other = TokenWindows(self.validation.held_out, config.seq_len)
            found["validation"] = self._loss(self.model, other.sequential(8 * config.eval_windows))
        return found

    def _loss(self, model: nn.Module, windows: np.ndarray) -> float:
        return mean_of_shares(self.accelerator, partial(mean_loss, model), windows)

    def conclude(self, state: TrainState) -> dict:
        config, corpus = self.config, self.corpus
        # Slices of a model can be trained and scored by all ranks, but not taken apart by one.
        whole = load(state.run_dir) if state.accelerator.is_fsdp2 else self.model
        probe = self._probe(whole)
        slots = probe_memory(whole, self.held_out.sequential(config.final_windows))
        self.records.write(state, whole, final=probe | slots)
        result = {
            "metrics": scores(corpus, self.scored["loss"]) | {"tokens_per_second": speed(state.run_dir)},
            "chance": scores(corpus, math.log(corpus.vocab_size)),
            "baseline": {"name": "unigram"} | scores(corpus, unigram_loss(corpus)),
            "sample": sample(config, whole, corpus),
        } | ghost_steps(state.run_dir)
        if probe:
            result["experts"] = expert_summary(probe) | self.records.summary()
        if slots:
            result["memory"] = memory_summary(slots)
        if self.validation is not None:
            result["validation"] = scores(self.validation, self.scored["validation"])
        return result

    def _probe(self, model: GraphMoEForCausalLM) -> dict[str, Tensor]:
        """The experts of a trained model, taken apart."""
        some = self.held_out.sequential(self.config.eval_windows)
        probe = probe_experts(model, some) | probe_collaboration(model, some)
        final = self.held_out.sequential(self.config.final_windows)
        probe |= probe_balance(model, final, batch_size=self.config.batch_size)
        if self.thorough:
            probe |= probe_inference(model, some, max_tokens=INFERENCE_TOKENS)
        return probe

    def report(self, result: dict) -> None:
        report(result)

    @classmethod
    def evaluate(cls, config: LanguageModelConfig, recipe: str) -> None:
        evaluate(config)


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
