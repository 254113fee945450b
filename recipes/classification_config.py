"""The flags of every recipe that classifies texts, the texts as token ids, and the model."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerFast

from graphmoe.data.labelled_batches import LabelledBatches, encode_texts
from graphmoe.data.labelled_text import PARTS, LabelledText, load_classification
from graphmoe.data.tokenizer import build_tokenizer, num_tokens
from graphmoe.models import GraphMoEForSequenceClassification
from graphmoe.train.config import RunConfig, flag
from recipes.language_model_config import build
from recipes.routing_config import RoutingConfig
from recipes.text_baselines import tfidf


@dataclass(kw_only=True)
class ClassifierConfig(RoutingConfig):
    """Flags of every classifier of texts; a recipe overrides defaults."""

    max_steps: int = flag(240, "optimiser steps to train for")
    batch_size: int = flag(32, "texts in a batch")
    learning_rate: float = flag(5e-4, "peak learning rate")
    warmup_steps: int = flag(30, "optimiser steps until the peak learning rate")
    dataset: str = flag(
        "docstrings", "docstrings (of Python's library), ag_news, sst2, a .tsv or .csv file, or a hub name"
    )
    num_classes: int = flag(4, "packages to tell apart, of docstrings")
    validation: float = flag(0.15, "fraction of the texts to choose settings on, if none is published")
    test: float = flag(0.2, "fraction of the texts to report on, if none is published")
    split_seed: int = flag(0, "seed of the division into parts, the same for all --seed")
    tokenizer: str = flag(
        "bpe", "bpe (trained on the training part), bytes, or a pretrained tokenizer's name"
    )
    vocab_size: int = flag(4096, "tokens of a trained vocabulary")
    seq_len: int = flag(128, "tokens of a text that are read", aliases=["--max_seq_len"])
    embed_dim: int = flag(64, "channels of a token", aliases=["--d_model"])
    num_layers: int = flag(2, "blocks", aliases=["--n_layers"])
    num_heads: int = flag(4, "attention heads", aliases=["--n_heads"])
    num_experts: int = flag(8, "experts of a block; 1 is a dense model", aliases=["--n_experts"])
    top_k: int = flag(2, "experts a token, in the mean where experts choose")
    expert_dim: int = flag(64, "channels inside one expert")
    post_norm: float | None = flag(0.2, "start of the gain of the norm behind the experts")
    dropout: float = flag(0.1, "dropout on residual branches and before the last map")
    is_causal: bool = flag(False, "let tokens attend to earlier ones only")
    eval_every: int = flag(30, "optimiser steps between evaluations on the validation part")
    save_every: int = flag(30, "optimiser steps between checkpoints", aliases=["--save_interval"])
    keep_checkpoints: int = flag(8, "newest checkpoints to keep; the one of least validation loss is scored")

    def __post_init__(self):
        super().__post_init__()
        self.require("dropout", 0 <= self.dropout < 1, "a number >= 0 and < 1")
        self.require("seq_len", self.seq_len >= 1, "a number >= 1")
        self.require("split_seed", self.split_seed >= 0, "a number >= 0")


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Labelled texts as token ids.

    Attributes:
        data: The texts.
        tokenizer: Trained on the training part, unless it is a pretrained one.
        rows: Token ids of each text, by part.
    """

    data: LabelledText
    tokenizer: PreTrainedTokenizerFast
    rows: dict[str, list[np.ndarray]]

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def pad(self) -> int:
        """What fills up batches; masked, so that any id will do."""
        return self.tokenizer.pad_token_id or 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training text."""
        return [row.size for row in self.rows["train"]]

    @cached_property
    def tfidf(self) -> dict[str, float | str]:
        """The baseline, which is the same for every model on these texts."""
        return tfidf(self.data)

    def batches(self, part: str, seed: int = 0) -> LabelledBatches:
        """A part, as batches in an order that depends on the seed."""
        return LabelledBatches(self.rows[part], getattr(self.data, part).labels, pad=self.pad, seed=seed)

    def describe(self) -> str:
        """One plain line."""
        mean = sum(self.lengths) / len(self.lengths)
        vocabulary = f"vocabulary {num_tokens(self.tokenizer):,}"
        return f"{self.data.describe()}; {mean:.0f} tokens a text; {vocabulary}"


def read_labelled(config: RunConfig) -> LabelledText:
    """The labelled texts that the flags name, in parts."""
    return load_classification(
        config.dataset,
        data_dir=config.data_dir,
        num_classes=config.num_classes,
        validation=config.validation,
        test=config.test,
        seed=config.split_seed,
    )


def read_texts(config: ClassifierConfig) -> EncodedText:
    """The texts that the flags name."""
    data = read_labelled(config)
    tokenizer = build_tokenizer(config.tokenizer, data.train.texts, config.vocab_size)
    rows = {
        part: encode_texts(tokenizer, getattr(data, part).texts, config.tokenizer, config.seq_len)
        for part in PARTS
    }
    return EncodedText(data, tokenizer, rows)


def build_model(config: ClassifierConfig, texts: EncodedText) -> GraphMoEForSequenceClassification:
    """The model of a config on these texts."""
    return build(
        GraphMoEForSequenceClassification,
        config,
        vocab_size=num_tokens(texts.tokenizer),
        id2label=dict(enumerate(texts.data.class_names)),
        label2id={name: index for index, name in enumerate(texts.data.class_names)},
    )
