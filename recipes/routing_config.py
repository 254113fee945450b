"""Flags of the router: who chooses experts, by what scores, and how their load is balanced."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from graphmoe.train.config import RunConfig, flag


def switch(help: str) -> Any:
    """Declare a flag that is yes, no, or not given (``None``): something else then decides."""
    return field(default=None, metadata={"help": help, "nargs": "?", "const": True})


@dataclass(kw_only=True)
class RoutingConfig(RunConfig):
    """Flags of routing; without experts they mean nothing."""

    router: str = flag(
        "topk",
        "who chooses experts: topk, the token; contextual, what all of them say; threshold, tokens that an "
        "expert prefers; expert_choice, the experts (for encoders only)",
    )
    router_temperature: float = flag(1.0, "what the scores of the router are divided by")
    router_noise_std: float = flag(0.0, "standard deviation of noise on the scores, in training")
    scoring_func: Literal["softmax", "sigmoid"] = flag("softmax", "what makes weights of scores")
    norm_topk_prob: bool | None = switch(
        "divide the weights of a token by their sum; with topk and contextual without it"
    )
    router_bias: bool = flag(False, "balance the load of topk by a bias of each expert that no loss moves")
    router_bias_rate: float = flag(0.001, "what the bias moves by in an optimiser step")
    router_threshold_decay: float = flag(0.9, "what a threshold keeps of itself in an optimiser step")
    router_aux_loss_coef: float = flag(
        0.01, "weight of the load-balancing loss", aliases=["--aux_loss_weight"]
    )
    router_z_loss_coef: float = flag(0.001, "weight of the router z-loss", aliases=["--router_z_loss_weight"])
    num_shared_experts: int = flag(
        0, "experts of a block that serve every token beside those it is routed to"
    )
    capacity_factor: float | None = flag(
        None,
        "in training, most edges of an expert as a multiple of the mean; no limit without it. What is "
        "dropped depends on later tokens, too",
    )
    drop_penalty_coef: float = flag(
        0.001, "weight of the probability of dropped edges", aliases=["--drop_penalty_weight"]
    )

    def __post_init__(self):
        super().__post_init__()
        factor, rate = self.capacity_factor, self.router_bias_rate
        self.require("capacity_factor", factor is None or 0 < factor < math.inf, "a finite number > 0")
        self.require("router_bias_rate", 0 < rate < math.inf, "a finite number > 0")
        self.require("router_threshold_decay", 0 <= self.router_threshold_decay < 1, "a number >= 0 and < 1")
        self.require("num_shared_experts", self.num_shared_experts >= 0, "a number >= 0")
