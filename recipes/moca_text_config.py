"""The flags of the classifier with slots, experts and n-grams; its texts and its model."""

from dataclasses import dataclass
from functools import cached_property

from graphmoe.data.docstrings import DOCSTRINGS
from graphmoe.data.labelled_text import PARTS, LabelledText
from graphmoe.data.ngrams import HashedBatches, HashedText, TextHasher
from graphmoe.models import MocaTextConfig
from graphmoe.train.config import RunConfig, flag
from recipes.classification_config import read_labelled
from recipes.text_baselines import tfidf


@dataclass(kw_only=True)
class MocaClassifierConfig(RunConfig):
    """Flags of the classifier; ``--num_slots 0 --num_experts 1`` is one without memory and experts."""

    max_steps: int | None = flag(None, "optimiser steps to train for; 700, for docstrings 200")
    batch_size: int = flag(50, "texts in a batch")
    learning_rate: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(20, "optimiser steps until the peak learning rate")
    weight_decay: float = flag(2.0, "decoupled weight decay, a step and unit of learning rate")
    dataset: str = flag(
        "docstrings", "docstrings (of Python's library), ag_news, sst2, a .tsv or .csv file, or a hub name"
    )
    num_classes: int = flag(4, "packages to tell apart, of docstrings")
    validation: float = flag(0.05, "fraction of the texts to choose settings on, if none is published")
    test: float | None = flag(
        None, "fraction of the texts to report on, if none is published; 0.1, of docstrings 0.2"
    )
    split_seed: int = flag(0, "seed of the division into parts, the same for all --seed")
    vocab_size: int = flag(1 << 14, "buckets of words")
    num_ngrams: int = flag(1 << 17, "buckets of n-grams; 0: no n-grams")
    ngram_scale: float = flag(5.0, "length of the vector of n-gram weights of a text")
    seq_len: int = flag(128, "words of a text that are read in order", aliases=["--max_seq_len"])
    embed_dim: int = flag(64, "channels of a word and of a slot", aliases=["--d_model"])
    num_layers: int = flag(1, "layers, each with slots and experts of its own", aliases=["--n_layers"])
    num_experts: int = flag(4, "experts; 1 is a feed-forward without routing", aliases=["--n_experts"])
    top_k: int = flag(2, "experts a word")
    expert_dim: int = flag(64, "channels inside one expert")
    num_slots: int = flag(16, "memory slots of a text; 0 is a network without memory")
    slots_per_token: int = flag(2, "slots a word")
    num_heads: int = flag(4, "attention heads of reading", aliases=["--n_heads"])
    router_aux_loss_coef: float = flag(0.01, "weight of the load-balancing loss of experts")
    budget_coef: float = flag(0.05, "weight of the budget loss; 0: no budgets")
    budget_limit: float = flag(0.3, "fraction of its edges up to which a word pays nothing")
    budget_begin: float = flag(0.5, "fraction of the run after which the budget loss begins to count")
    budget_end: float = flag(0.8, "fraction of the run after which it counts fully")
    edge_floor: float = flag(0.05, "edges whose weight times the budget is below are left out")
    dropout: float = flag(0.5, "dropout before the last map")
    token_dropout: float = flag(0.1, "fraction of the words and of the n-grams left out in training")
    label_smoothing: float = flag(0.05, "probability spread over all classes, in training")
    compare: bool = flag(True, "train the model without memory and experts, too")

    def __post_init__(self):
        small = self.dataset == DOCSTRINGS
        if self.max_steps is None:
            self.max_steps = 200 if small else 700
        if self.test is None:
            self.test = 0.2 if small else 0.1
        super().__post_init__()
        for name in ("dropout", "token_dropout", "label_smoothing"):
            self.require(name, 0 <= getattr(self, name) < 1, "a number >= 0 and < 1")
        for name in ("vocab_size", "seq_len", "embed_dim", "num_layers", "num_experts", "expert_dim"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        even = self.num_ngrams >= 0 and self.num_ngrams % 2 == 0
        self.require("num_ngrams", even, "an even number >= 0")
        self.require("num_slots", self.num_slots >= 0, "a number >= 0")
        if self.num_slots:
            fits = 1 <= self.slots_per_token <= self.num_slots
            self.require("slots_per_token", fits, f"from 1 to {self.num_slots}")
        if self.num_experts > 1:
            self.require("top_k", 1 <= self.top_k <= self.num_experts, f"from 1 to {self.num_experts}")
        ends = f"from 0 to {self.budget_end}"
        self.require("budget_begin", 0 <= self.budget_begin <= self.budget_end, ends)
        self.require("budget_end", self.budget_end <= 1, "a number <= 1")
        divides = self.num_heads >= 1 and self.embed_dim % self.num_heads == 0
        self.require("num_heads", divides, f"a divisor of --embed_dim {self.embed_dim}")
        self.require("split_seed", self.split_seed >= 0, "a number >= 0")

    @property
    def routed(self) -> bool:
        """Whether there is anything that a comparison could leave out."""
        return self.num_slots > 0 or self.num_experts > 1

    def architecture(self, class_names: tuple[str, ...]) -> MocaTextConfig:
        """The config of the model."""
        return MocaTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.embed_dim,
            intermediate_size=self.expert_dim,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.seq_len,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            num_slots=self.num_slots,
            num_slots_per_tok=self.slots_per_token,
            num_memory_heads=self.num_heads,
            budget_coef=self.budget_coef if self.routed else 0.0,
            budget_limit=self.budget_limit,
            edge_floor=self.edge_floor,
            router_aux_loss_coef=self.router_aux_loss_coef,
            num_ngrams=self.num_ngrams,
            ngram_scale=self.ngram_scale,
            dropout=self.dropout,
            token_dropout=self.token_dropout,
            label_smoothing=self.label_smoothing,
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
        )


@dataclass(frozen=True, eq=False)
class HashedTexts:
    """Labelled texts as buckets.

    Attributes:
        data: The texts.
        rows: Each text hashed, by part.
    """

    data: LabelledText
    rows: dict[str, list[HashedText]]

    @cached_property
    def tfidf(self) -> dict[str, float | str]:
        """The baseline, which is the same for every model on these texts."""
        return tfidf(self.data)

    def batches(self, part: str, seed: int = 0) -> HashedBatches:
        """A part, as batches in an order that depends on the seed."""
        return HashedBatches(self.rows[part], getattr(self.data, part).labels, seed=seed)


def read_texts(config: MocaClassifierConfig) -> HashedTexts:
    """The texts that the flags name."""
    data = read_labelled(config)
    hasher = TextHasher(config.vocab_size, config.num_ngrams or 2)
    rows = {part: [hasher(text, config.seq_len) for text in getattr(data, part).texts] for part in PARTS}
    return HashedTexts(data, rows)
