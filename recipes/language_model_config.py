"""The flags of every language-model recipe, and the model that they describe."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from graphmoe.data import Corpus
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM
from graphmoe.models.pretrained import GraphMoEPreTrainedModel
from graphmoe.train.config import RunConfig, flag
from graphmoe.train.config import with_default as any_with_default
from graphmoe.train.loop import reseed
from recipes.collaboration_config import CollaborationConfig

T = TypeVar("T", bound=GraphMoEPreTrainedModel)

# The words of the command line, where they differ from those of transformers and of layers.
_MODEL_WORDS = {
    "embed_dim": "hidden_size",
    "expert_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "seq_len": "max_position_embeddings",
    "top_k": "num_experts_per_tok",
    "collab_dim": "collab_hidden_size",
    "gradient_checkpointing": "checkpoint_policy",
}
_FLAGS = {word: name for name, word in _MODEL_WORDS.items()} | {
    "k": "top_k",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "mediator": "collab_mediator",
    "graph": "collab_graph",
    "hidden_channels": "collab_dim",
}


@dataclass(kw_only=True)
class LanguageModelConfig(CollaborationConfig):
    """Flags of every language-model recipe; a recipe overrides defaults."""

    max_steps: int = flag(560, "optimiser steps to train for")
    batch_size: int = flag(8, "sequences in a batch")
    learning_rate: float = flag(4e-3, "peak learning rate")
    dataset: str | None = flag(
        None, "what to train on; without it what lies in --data_dir, or without that either stdlib"
    )
    embed_dim: int = flag(128, "channels of a token", aliases=["--d_model"])
    num_layers: int = flag(4, "blocks", aliases=["--n_layers"])
    num_heads: int = flag(4, "attention heads", aliases=["--n_heads"])
    num_kv_heads: int | None = flag(
        None, "key and value heads; as many as --num_heads without it", aliases=["--n_kv_heads"]
    )
    expert_dim: int = flag(128, "channels inside one expert")
    num_experts: int = flag(6, "primary experts of a block; 1 is a dense model", aliases=["--n_experts"])
    top_k: int = flag(3, "experts a token")
    seq_len: int = flag(
        128, "tokens of a training sequence, and the most that the model takes", aliases=["--max_seq_len"]
    )
    dropout: float = flag(0.0, "dropout on residual branches")
    post_norm: float | None = flag(0.2, "start of the gain of the norm behind the experts")
    num_memory_slots: int = flag(0, "slots that a block keeps for each sequence; 0 for no memory")
    num_memory_slots_per_tok: int = flag(2, "slots that a token reads and writes")
    num_memory_heads: int = flag(4, "attention heads that read from slots")
    memory_aux_loss_coef: float = flag(0.01, "weight of the load-balancing loss of slots")
    coupling: str = flag("none", "how the experts of a token talk: none, gnn, hyper or collab")
    coupling_layers: int | None = flag(
        None, "rounds of coupling; 1 for hyper and else 2 without it", aliases=["--moc_collab_steps"]
    )
    coupling_norm: bool = flag(False, "RMSNorm of what the experts of a token say to one another")
    coupling_scale: float | None = flag(
        None, "start of a learned factor of what coupling adds; without it there is none"
    )
    hyperedge_strategy: str = flag(
        "all_pairs", "all_pairs, all_triplets, all or custom", aliases=["--hgnn_strategy"]
    )
    hyperedges: str | None = flag(
        None, 'experts of each custom hyperedge, such as "0,1,2;2,3"; implies the strategy custom'
    )
    hyperedge_attention: bool = flag(False, "weigh the members of hyperedges by attention")
    max_hyperedges: int = flag(4096, "most hyperedges of a block")
    routed_scaling_factor: float = flag(1.0, "what the routing weights of a token sum to")
    fusion: str = flag(
        "sum", "what returns to a token: sum of its rows by routing weight, mean, or gated with the mediator"
    )
    fusion_projection: bool = flag(False, "linear map, GELU and LayerNorm behind the fused rows")
    num_ghosts: int = flag(0, "ghost experts of a block", aliases=["--ghost_num_ghost_experts"])
    ghost_activation_threshold: float = flag(0.01, "saturation above which a ghost wakes")
    ghost_rate: float = flag(0.01, "level that a waking ghost gains per optimiser step")
    ghost_window: int = flag(100, "optimiser steps that saturation averages over")
    ghost_lr_schedule: Literal["level", "inverse", "complementary"] = flag(
        "level", "ghosts learn at the primary rate times their level, or against it"
    )
    ghost_learning_rate: float | None = flag(
        None, "peak learning rate of ghosts, for inverse and complementary; --learning_rate without it"
    )
    orthogonality_output_coef: float = flag(0.0, "weight of the orthogonality of mean expert outputs")
    orthogonality_weight_coef: float = flag(0.0, "weight of the orthogonality of expert weights")
    orthogonality_warmup_steps: int = flag(1000, "optimiser steps until orthogonality has full strength")
    orthogonality_adaptive: bool = flag(False, "adjust the strength of each block to its specialisation")
    orthogonality_schedule: Literal["constant", "cosine", "exponential", "linear", "step"] = flag(
        "cosine", "adaptive strength over time"
    )
    orthogonality_interval: int = flag(500, "optimiser steps between adjustments of the adaptive strength")
    orthogonality_decay: float = flag(0.8, "adaptive strength of a block relative to the one before")
    orthogonality_target: float = flag(0.95, "specialisation aimed at; 1 is that of random vectors")
    orthogonality_min: float = flag(1e-3, "least adaptive strength")
    orthogonality_max: float = flag(0.3, "largest adaptive strength")
    tokenizer: str = flag("bpe", "bpe (trained on the corpus), bytes, or a pretrained tokenizer's name")
    vocab_size: int = flag(4096, "tokens of a trained vocabulary")
    held_out: float = flag(0.1, "fraction of the documents never trained on")
    eval_windows: int = flag(64, "held-out sequences scored while training")
    final_windows: int | None = flag(None, "held-out sequences scored at the end; all without it")
    sample: str | None = flag(None, "text to continue, at the end of training or with --evaluate")
    sample_tokens: int = flag(96, "most tokens of a sample; 0 for none")
    sample_temperature: float = flag(0.8, "temperature of a sample; 0 takes the likeliest token each time")
    sample_top_k: int = flag(50, "tokens that a sample chooses from each time; 0 for all")
    sample_top_p: float = flag(1.0, "probability that those tokens have at most together")
    epochs: float | None = flag(None, "passes over the training tokens, in place of --max_steps")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset is None:
            self.dataset = "stdlib" if self.data_dir is None else "."
        self.require("dropout", 0 <= self.dropout < 1, "a number >= 0 and < 1")
        talks = self.coupling == "collab" and self.coupling_layers != 0
        if talks or self.router == "contextual":
            fits = self.collab_heads >= 1 and self.embed_dim % self.collab_heads == 0
            self.require("collab_heads", fits, f"a divisor of --embed_dim {self.embed_dim}")
        if self.decode_rounds is not None:
            possible = self.decode_rounds >= 0 and talks
            self.require("decode_rounds", possible, "a number >= 0, of experts with --coupling collab")
        self.require("num_memory_slots", self.num_memory_slots >= 0, "a number >= 0")
        if self.num_memory_slots:
            fits = 1 <= self.num_memory_slots_per_tok <= self.num_memory_slots
            self.require("num_memory_slots_per_tok", fits, f"from 1 to {self.num_memory_slots}")
            fits = self.num_memory_heads >= 1 and self.embed_dim % self.num_memory_heads == 0
            self.require("num_memory_heads", fits, f"a divisor of --embed_dim {self.embed_dim}")
        for name in ("eval_windows", "final_windows"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "a number >= 1")
        heat, share = self.sample_temperature, self.sample_top_p
        self.require("sample_temperature", 0 <= heat < math.inf, "a finite number >= 0")
        self.require("sample_top_k", self.sample_top_k >= 0, "a number >= 0")
        self.require("sample_top_p", 0 < share <= 1, "a number > 0 and <= 1")
        self.require("epochs", self.epochs is None or 0 < self.epochs < math.inf, "a number > 0")
        self.require("sample_tokens", self.sample_tokens >= 0, "a number >= 0")
        rate = self.ghost_learning_rate
        self.require("ghost_learning_rate", rate is None or 0 <= rate < math.inf, "a finite number >= 0")
        if self.hyperedges is not None:
            self.hyperedge_strategy = "custom"


with_default = partial(any_with_default, LanguageModelConfig)
"""The flag of this name with another default."""


def parse_hyperedges(text: str) -> list[list[int]]:
    """``"0,1,2;2,3"`` as ``[[0, 1, 2], [2, 3]]``; whether the experts exist is for the model to say."""
    try:
        return [[int(expert) for expert in edge.split(",") if edge.strip()] for edge in text.split(";")]
    except ValueError:
        raise ConfigError("not a list of hyperedges", "--hyperedges", '"0,1,2;2,3"', text) from None


def build_model(config: LanguageModelConfig, corpus: Corpus) -> GraphMoEForCausalLM:
    """The model of a config on a corpus."""
    end = None if corpus.tokenizer is None else corpus.tokenizer.eos_token_id
    hyperedges = None if config.hyperedges is None else parse_hyperedges(config.hyperedges)
    return build(
        GraphMoEForCausalLM, config, hyperedges=hyperedges, vocab_size=corpus.vocab_size,
        eos_token_id=end, bos_token_id=end, checkpoint_policy=config.checkpoint_policy,
    )  # fmt: skip


def build(model_class: type[T], config: RunConfig, **settings: Any) -> T:
    """A model whose settings are the flags of a config, and ``settings``, in the model's words.

    Raises:
        ConfigError: If it cannot be built; the error names the flag, not the model's word for it.
    """
    known = {field.name for field in dataclasses.fields(GraphMoEConfig)}
    settings = {_MODEL_WORDS.get(name, name): value for name, value in vars(config).items()} | settings
    own = {name: value for name, value in settings.items() if name in known}
    reseed(config.seed, 0)
    try:
        return model_class(GraphMoEConfig(**own))
    except ConfigError as error:
        where = f"--{_FLAGS.get(error.where, error.where)}"
        raise ConfigError(error.what, where, error.expected, error.got) from None
