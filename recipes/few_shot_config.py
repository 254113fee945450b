"""The flags of the few-shot recipe, and the characters that they name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from graphmoe.data.few_shot import Characters, Episodes, split_characters
from graphmoe.data.glyphs import load_glyphs
from graphmoe.data.omniglot import load_omniglot
from graphmoe.models.memory_transformer_configuration import MemoryTransformerConfig
from graphmoe.train.config import RunConfig, flag

HELD_OUT = {"omniglot": ("character", 200), "glyphs": ("alphabet", 125)}
"""How characters are divided unless flags say otherwise, and how many are not trained on."""

SCORED_SEED = 1 << 32
"""Seed of the episodes that are scored: the same for all models, and no ``--seed`` trains on any of them."""


@dataclass(kw_only=True)
class FewShotConfig(RunConfig):
    """Flags of few-shot classification."""

    max_steps: int = flag(1600, "optimiser steps to train each of the two models for")
    batch_size: int = flag(1, "episodes in a batch")
    learning_rate: float = flag(2e-3, "peak learning rate")
    weight_decay: float = flag(1e-4, "decoupled weight decay, a step and unit of learning rate")
    warmup_steps: int = flag(20, "optimiser steps until the peak learning rate")
    max_grad_norm: float = flag(10.0, "largest norm of all gradients together; inf does not clip")
    bf16: bool = flag(True, "compute embeddings in bfloat16 in training, keep weights in float32")
    dataset: Literal["auto", "omniglot", "glyphs"] = flag(
        "auto", "omniglot, of --data_dir; glyphs of matplotlib's fonts; auto: omniglot with --data_dir"
    )
    split: Literal["auto", "character", "alphabet"] = flag(
        "auto", "hold out any characters, or whole alphabets; auto: characters of omniglot, scripts of glyphs"
    )
    held_out: int | None = flag(
        None, "characters that are not trained on, with --split alphabet at most; default 200, of glyphs 125"
    )
    split_seed: int = flag(0, "seed of the division, the same for all --seed")
    model: Literal["memory", "prototypes"] = flag("memory", "what to train")
    compare: bool = flag(True, "then also train the prototypical network with the same encoder")
    encoder: Literal["conv", "patch"] = flag("conv", "four convolutions, or a transformer over patches")
    embed_dim: int = flag(64, "channels of an embedding")
    encoder_dim: int | None = flag(None, "channels inside the encoder; default 64, of patch 256")
    num_layers: int = flag(4, "blocks of the patch transformer")
    num_heads: int = flag(8, "attention heads of the patch transformer")
    num_slots: int = flag(500, "slots of the memory of an episode")
    train_ways: int = flag(60, "characters of a training episode")
    train_drawings: int = flag(3, "drawings of each, every one of which the others have to tell")
    turns: bool = flag(True, "in training, let a character turned by 90 degrees be another one")
    augment: bool = flag(True, "in training, turn, scale and shift each drawing at random")
    ways: list[int] = field(
        default_factory=lambda: [5, 20], metadata={"help": "characters of an episode that is scored"}
    )
    shots: list[int] = field(
        default_factory=lambda: [1, 5], metadata={"help": "drawings of each character to learn from"}
    )
    queries: int = flag(5, "other drawings of each character to tell")
    episodes: int = flag(8000, "episodes of 5 characters to score in the end; of more characters fewer")
    views: int = flag(
        5, "slight distortions of a drawing, itself among them, over which it is embedded in the end"
    )
    eval_episodes: int = flag(400, "as many while training")
    eval_every: int = flag(400, "optimiser steps between evaluations")
    save_every: int = flag(400, "optimiser steps between checkpoints", aliases=["--save_interval"])

    def __post_init__(self):
        super().__post_init__()
        for name in ("ways", "shots"):
            values = getattr(self, name)
            self.require(name, 0 < len(set(values)) == len(values), "different numbers")
            self.require(name, min(values) >= (2 if name == "ways" else 1), "2 ways, 1 shot at least")
        self.require("train_ways", self.train_ways >= 2, "a number >= 2")
        self.require("train_drawings", self.train_drawings >= 2, "a number >= 2")
        for name in ("queries", "episodes", "eval_episodes", "views"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        self.require("split_seed", self.split_seed >= 0, "a number >= 0")
        self.require("seed", self.seed < SCORED_SEED, f"a number below {SCORED_SEED}")
        most = max(max(self.ways) * max(self.shots), self.train_ways * self.train_drawings)
        fits = self.model != "memory" or self.num_slots >= most
        self.require("num_slots", fits, f"at least {most}, the examples of the largest episode")

    @property
    def source(self) -> str:
        """The data set that ``auto`` means."""
        return self.dataset if self.dataset != "auto" else "omniglot" if self.data_dir else "glyphs"

    def grid(self) -> Iterator[tuple[str, int, int]]:
        """What is scored: a name such as ``5w1s``, ways and shots."""
        for ways in self.ways:
            for shots in self.shots:
                yield f"{ways}w{shots}s", ways, shots

    def episodes_of(self, characters: Characters, ways: int, shots: int) -> Episodes:
        """The episodes that are scored.

        Raises:
            DataError: They take more than the data have.
        """
        return Episodes(characters, ways, shots, self.queries, seed=SCORED_SEED)

    def training_episodes(self, characters: Characters) -> Episodes:
        """The episodes that are trained on.

        Raises:
            DataError: They take more than the data have.
        """
        return Episodes(
            characters, self.train_ways, self.train_drawings, 0,
            turns=self.turns, augment=self.augment, seed=self.seed,
        )  # fmt: skip

    def architecture(self) -> MemoryTransformerConfig:
        """The sizes of the models."""
        return MemoryTransformerConfig(
            encoder=self.encoder,
            hidden_size=self.embed_dim,
            encoder_channels=self.encoder_dim,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_slots=self.num_slots,
            max_ways=max(*self.ways, self.train_ways),
        )


def read_characters(config: FewShotConfig) -> tuple[Characters, Characters]:
    """The characters to train on, and those never seen in training.

    Raises:
        DataError: No such data, or no such division.
    """
    characters = load_glyphs() if config.source == "glyphs" else load_omniglot(config.data_dir)
    split, held_out = HELD_OUT[config.source]
    if config.split not in ("auto", split):
        split, held_out = config.split, min(held_out, len(characters) // 3)
    held_out = held_out if config.held_out is None else config.held_out
    return split_characters(characters, held_out, by=split, seed=config.split_seed)
