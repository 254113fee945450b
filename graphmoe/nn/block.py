import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphmoe.errors import ConfigError
from graphmoe.nn.attend import AttendConv
from graphmoe.nn.expert import FeedForward
from graphmoe.nn.memory_layer import MemoryLayer
from graphmoe.nn.moe import MoELayer
from graphmoe.nn.norm import RMSNorm
from graphmoe.typing import MemoryRecord, Record


class Block(nn.Module):
    r"""Pre-norm transformer block over sequences: ``x + attend(norm(x))``, then ``x + moe(norm(x))``.

    With ``post_norm`` what the second branch adds is normalised too, ``x + norm(moe(norm(x)))`` (half of the
    "sandwich" of `CogView <https://arxiv.org/abs/2105.13290>`_): a mixture, whose outputs start ``k`` times
    smaller than those of a dense layer, then has a say from the first step on.

    With ``memory`` there is a branch between the two, ``x + memory(norm(x))``: every token reads what earlier
    ones of its sequence have written into slots, then writes itself. With a cache the contents of the slots
    go on from call to call.

    Where the experts choose their tokens, they do so in each sequence as if it were alone, so that no
    sequence depends on what else is in its batch.

    Args:
        attend: Attention along ``token -> token`` edges.
        feed_forward: What every token passes through: :class:`MoELayer`, or :class:`FeedForward`
            for a dense block.
        memory: Slots of each sequence, or ``None``.
        channels: Channels ``D``.
        norm_eps: Added to the mean square in RMSNorm.
        dropout: On both residual branches, in training.
        post_norm: Start of the learned gain of an RMSNorm behind the feed-forward; ``None``: no such norm.

    Shapes:
        - **input:** ``x [B, T, D]``; ``position``, ``mask``, ``cache``, ``layer`` as in
          :class:`AttendConv`, with ``memory`` a cache has ``layers[layer].memory``, too; ``present [B, T]``
          bool, False for padding, which is not routed; ``rounds`` and
          ``steps`` as in :class:`MoELayer`; ``recompute``: keep nothing of the second branch for the backward
          pass, but compute it again.
        - **output:** ``x [B, T, D]``; :class:`~graphmoe.typing.Record` of the mixture, and
          :class:`~graphmoe.typing.MemoryRecord` of the memory, each ``None`` without one.

    Raises:
        ConfigError: A router that looks at other tokens beside attention that must not see the future.
    """

    def __init__(
        self,
        attend: AttendConv,
        feed_forward: MoELayer | FeedForward,
        channels: int,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        post_norm: float | None = None,
        memory: MemoryLayer | None = None,
    ):
        super().__init__()
        by_token = not isinstance(feed_forward, MoELayer) or feed_forward.router.causal
        if attend.causal and not by_token:
            what = "experts that choose their tokens see the future"
            expected = "threshold, the causal form of it, or attention with causal=False"
            raise ConfigError(what, "router", expected, type(feed_forward.router).__name__)
        self.looks_around = not by_token
        self.attend, self.feed_forward = attend, feed_forward
        self.attend_norm = RMSNorm(channels, eps=norm_eps)
        self.memory = memory
        self.memory_norm = None if memory is None else RMSNorm(channels, eps=norm_eps)
        self.feed_forward_norm = RMSNorm(channels, eps=norm_eps)
        self.post_norm = post_norm
        self.feed_forward_post_norm = None
        if post_norm is not None:
            self.feed_forward_post_norm = RMSNorm(channels, eps=norm_eps)
            nn.init.constant_(self.feed_forward_post_norm.weight, post_norm)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        present: Tensor | None = None,
        cache: object | None = None,
        layer: int = 0,
        rounds: int | None = None,
        steps: int | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Record | None, MemoryRecord | None]:
        heard = self.attend(self.attend_norm(x), position=position, mask=mask, cache=cache, layer=layer)
        x, remembered = x + self.dropout(heard), None
        if self.memory is not None:
            read, remembered = self._remember(x, present, cache, layer)
            x = x + self.dropout(read)
        if recompute:
            added, record = checkpoint(self._feed_forward, x, present, rounds, steps, use_reentrant=False)
        else:
            added, record = self._feed_forward(x, present, rounds, steps)
        return x + self.dropout(added), record, remembered

    def _remember(
        self, x: Tensor, present: Tensor | None, cache: object | None, layer: int
    ) -> tuple[Tensor, MemoryRecord]:
        """What the tokens read of the memory, before dropout, and what it did; what they wrote is left in the
        cache."""
        state = None if cache is None else cache.layers[layer].memory
        read, state, record = self.memory(self.memory_norm(x), present, state)
        if cache is not None:
            cache.layers[layer].memory = state
        return read, record

    def _feed_forward(
        self, x: Tensor, present: Tensor | None, rounds: int | None, steps: int | None
    ) -> tuple[Tensor, Record | None]:
        """What the second branch adds, before dropout, and what its mixture did."""
        x, record = self.feed_forward_norm(x), None
        if isinstance(self.feed_forward, MoELayer):
            options = {"rounds": rounds, "steps": steps}
            if self.looks_around:
                sequence = torch.arange(x.size(0), device=x.device)
                options["batch"] = sequence.unsqueeze(1).expand(x.shape[:2])
            x, record = self.feed_forward(x, mask=present, return_record=True, **options)
        else:
            x = self.feed_forward(x)
        return x if self.feed_forward_post_norm is None else self.feed_forward_post_norm(x), record
