import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError


class ByteDropout(nn.Module):
    r"""Dropout (`Srivastava et al. 2014 <https://jmlr.org/papers/v15/srivastava14a.html>`_) whose chance is
    a multiple of 1/256: one random number of 64 bits decides about eight values.

    .. math::
        y = \frac{m \odot x}{1 - p}, \qquad m \sim \mathrm{Bernoulli}(1 - p)

    Beside a sparse layer torch's own dropout takes as long as the layer. Compiled code uses that one, with
    the same ``p``.

    Args:
        p: Chance that a value becomes 0, in [0, 1), which is rounded to a multiple of 1/256.

    Raises:
        ConfigError: A chance that is none.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError("no chance of dropout", "p", "from 0 on, below 1", p)
        self.dropped = min(round(256 * p), 255)

    @property
    def p(self) -> float:
        """The chance that is applied."""
        return self.dropped / 256

    @property
    def is_active(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.dropped > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        if torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        return x * self.draw_mask(x.shape, x)

    def draw_mask(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """What values are multiplied with, 0 or ``1 / (1 - p)``; dtype and device are those of ``like``."""
        count = math.prod(shape)
        words = torch.empty(count // 8 + 1, dtype=torch.int64, device=like.device)
        # From the least int64 on: by default the sign would stay 0.
        numbers = words.random_(-(2**63), None).view(torch.uint8)[:count].view(shape)
        return (numbers >= self.dropped).to(like.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p:g}"
