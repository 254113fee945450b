"""Flags of experts that collaborate and that reason in steps."""

from dataclasses import dataclass
from typing import Literal

from graphmoe.train.config import flag
from recipes.routing_config import RoutingConfig, switch


@dataclass(kw_only=True)
class CollaborationConfig(RoutingConfig):
    """Flags of collaboration; without ``--coupling collab`` those that begin with it mean nothing."""

    reasoning_steps: int = flag(
        0, "passes of an expert over its own result; 0 for plain experts", aliases=["--n_reasoning_steps"]
    )
    collab_heads: int = flag(
        4, "attention heads among the experts of a token", aliases=["--moc_collab_heads"]
    )
    collab_dim: int | None = flag(
        None, "channels inside the feed-forward step of collaboration; --embed_dim without it"
    )
    collab_mediator: bool = flag(
        True, "let a learned mediator collaborate with the experts", aliases=["--moc_use_mediator"]
    )
    collab_graph: str = flag("complete", "who hears whom: complete, or self, a control without talk")
    collab_dropout: float = flag(
        0.0, "dropout on attention weights of collaboration", aliases=["--moc_collab_dropout"]
    )
    diversity_coef: float = flag(
        0.0, "weight of the negative entropy of that attention", aliases=["--diversity_loss_weight"]
    )
    gradient_checkpointing: Literal["none", "ffn", "block"] | None = flag(
        None,
        "what the backward pass computes again to save memory: nothing, the experts, or whole blocks",
        aliases=["--grad_ckpt_policy"],
    )
    use_gradient_checkpointing: bool | None = switch(
        "false: compute nothing again; true: the experts, unless --gradient_checkpointing says otherwise"
    )
    decode_rounds: int | None = flag(
        None, "rounds of collaboration when scoring with --evaluate or sampling; as trained without it"
    )
    decode_steps: int | None = flag(
        None, "passes of the experts when scoring with --evaluate or sampling; as trained without it"
    )

    def __post_init__(self):
        super().__post_init__()
        self.require("collab_dropout", 0 <= self.collab_dropout < 1, "a number >= 0 and < 1")
        self.require("reasoning_steps", self.reasoning_steps >= 0, "a number >= 0")
        if self.decode_steps is not None:
            possible = self.decode_steps >= 1 and self.reasoning_steps >= 1
            self.require("decode_steps", possible, "a number >= 1, of experts with --reasoning_steps")

    @property
    def checkpoint_policy(self) -> str:
        """What the backward pass computes again, as both flags together say."""
        if self.use_gradient_checkpointing is False:
            return "none"
        return self.gradient_checkpointing or ("ffn" if self.use_gradient_checkpointing else "none")
