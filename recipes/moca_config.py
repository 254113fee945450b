"""The flags of the recipes about slots and experts that copy, the data and the model."""

from dataclasses import dataclass
from typing import Literal

from graphmoe.data.copy_task import CopyTask
from graphmoe.models import MocaConfig
from graphmoe.train.config import RunConfig, flag


@dataclass(kw_only=True)
class MocaCopyConfig(RunConfig):
    """Flags of the copy task; ``--num_slots 0`` is the network without a memory."""

    max_steps: int = flag(500, "optimiser steps to train for")
    batch_size: int = flag(32, "sequences in a batch")
    learning_rate: float = flag(3e-3, "peak learning rate")
    lr_scheduler_type: str = flag("cosine_with_min_lr", "learning-rate schedule, a name transformers knows")
    min_lr_ratio: float = flag(0.05, "last learning rate as a fraction of the peak")
    weight_decay: float = flag(0.0, "decoupled weight decay, a step and unit of learning rate")
    adam_beta2: float = flag(0.98, "decay of AdamW's mean of squared gradients", aliases=["--beta2"])
    dataset: str = flag("copy", "what to train on: copy, made on the spot")
    num_tokens: int = flag(126, "different tokens of a sequence")
    min_length: int = flag(10, "tokens of the shortest sequence")
    max_length: int = flag(60, "tokens of the longest sequence")
    embed_dim: int = flag(128, "channels of a token and of a slot", aliases=["--d_model"])
    num_layers: int = flag(1, "layers, each with slots and experts of its own", aliases=["--n_layers"])
    num_experts: int = flag(4, "experts; 1 is a feed-forward without routing", aliases=["--n_experts"])
    top_k: int = flag(2, "experts a token")
    expert_dim: int = flag(256, "channels inside one expert")
    num_slots: int = flag(32, "memory slots; 0 is a network without memory")
    slots_per_token: int = flag(2, "slots a token")
    num_heads: int = flag(4, "attention heads of reading", aliases=["--n_heads"])
    binding: bool = flag(True, "multiply what is written and what is read by a map of the position")
    address: Literal["token", "key"] = flag("token", "what chooses slots: the token, or its position")
    read_dependent_gate: bool = flag(False, "let the gate of writing see what was read; several times slower")
    temperature: float = flag(1.0, "divides the scores of all routers")
    router_aux_loss_coef: float = flag(0.01, "weight of the load-balancing loss of experts")
    collision_coef: float = flag(0.1, "weight of the loss of tokens that meet in a slot")
    budget_coef: float = flag(0.05, "weight of the budget loss; 0: no budgets")
    budget_limit: float = flag(0.3, "fraction of its edges up to which a token pays nothing")
    budget_begin: float = flag(0.6, "fraction of the run after which the budget loss begins to count")
    budget_end: float = flag(0.85, "fraction of the run after which it counts fully")
    edge_floor: float = flag(0.05, "edges whose weight times the budget is below are left out")
    eval_every: int = flag(100, "optimiser steps between evaluations")
    eval_sequences: int = flag(128, "fresh sequences scored while training")
    test_sequences: int = flag(1000, "fresh sequences scored at the end")
    baseline_steps: int = flag(100, "optimiser steps of the same network without memory; 0: do not train it")

    def __post_init__(self):
        super().__post_init__()
        self.require("dataset", self.dataset == "copy", "copy")
        self.require("num_tokens", self.num_tokens >= 2, "a number >= 2")
        self.require("min_length", 1 <= self.min_length <= self.max_length, f"from 1 to {self.max_length}")
        self.require("num_slots", self.num_slots >= 0, "a number >= 0")
        if self.num_slots:
            fits = 1 <= self.slots_per_token <= self.num_slots
            self.require("slots_per_token", fits, f"from 1 to {self.num_slots}")
        if self.num_experts > 1:
            self.require("top_k", 1 <= self.top_k <= self.num_experts, f"from 1 to {self.num_experts}")
        self.require(
            "budget_begin", 0 <= self.budget_begin <= self.budget_end, f"from 0 to {self.budget_end}"
        )
        self.require("budget_end", self.budget_end <= 1, "a number <= 1")
        for name in ("eval_sequences", "test_sequences"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        self.require("baseline_steps", self.baseline_steps >= 0, "a number >= 0")

    def task(self, part: str) -> CopyTask:
        """The sequences of a part."""
        return CopyTask(self.num_tokens, self.min_length, self.max_length, seed=self.seed, part=part)

    def architecture(self) -> MocaConfig:
        """The config of the model."""
        routed = self.num_slots > 0 or self.num_experts > 1
        task = self.task("train")
        return MocaConfig(
            vocab_size=task.vocab_size,
            hidden_size=self.embed_dim,
            intermediate_size=self.expert_dim,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.max_length + 1,  # the delimiter has a place, too
            delimiter_token_id=task.delimiter,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            num_slots=self.num_slots,
            num_slots_per_tok=self.slots_per_token,
            num_memory_heads=self.num_heads,
            memory_binding=self.binding,
            memory_address=self.address,
            read_dependent_gate=self.read_dependent_gate,
            router_temperature=self.temperature,
            budget_coef=self.budget_coef if routed else 0.0,
            budget_limit=self.budget_limit,
            edge_floor=self.edge_floor,
            collision_coef=self.collision_coef if self.num_slots else 0.0,
            router_aux_loss_coef=self.router_aux_loss_coef,
        )
