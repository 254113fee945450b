from torch import Tensor, nn

from graphmoe.nn.attend import AttendConv
from graphmoe.nn.expert import FeedForward
from graphmoe.nn.moe import MoELayer
from graphmoe.typing import Record


class Block(nn.Module):
    r"""Pre-norm transformer block over sequences: ``x + attend(norm(x))``, then ``x + moe(norm(x))``.

    Args:
        attend: Attention along ``token -> token`` edges.
        feed_forward: What every token passes through: :class:`MoELayer`, or :class:`FeedForward`
            for a dense block.
        channels: Channels ``D``.
        norm_eps: Added to the mean square in RMSNorm.
        dropout: On both residual branches, in training.

    Shapes:
        - **input:** ``x [B, T, D]``; ``position``, ``mask``, ``cache``, ``layer`` as in
          :class:`AttendConv`; ``present [B, T]`` bool, False for padding, which is not routed.
        - **output:** ``(x [B, T, D], Record or None)``.
    """

    def __init__(
        self,
        attend: AttendConv,
        feed_forward: MoELayer | FeedForward,
        channels: int,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.attend, self.feed_forward = attend, feed_forward
        self.attend_norm = nn.RMSNorm(channels, eps=norm_eps)
        self.feed_forward_norm = nn.RMSNorm(channels, eps=norm_eps)
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
    ) -> tuple[Tensor, Record | None]:
        heard = self.attend(self.attend_norm(x), position=position, mask=mask, cache=cache, layer=layer)
        x = x + self.dropout(heard)
        if isinstance(self.feed_forward, MoELayer):
            out, record = self.feed_forward(self.feed_forward_norm(x), mask=present, return_record=True)
        else:
            out, record = self.feed_forward(self.feed_forward_norm(x)), None
        return x + self.dropout(out), record
