"""What vision transformers of transformers lack."""

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError


class PatchDropout(nn.Module):
    """Leaves random patches of every image out while a vision transformer trains, which then costs less and
    sees another part of the image each time (`PatchDropout <https://arxiv.org/abs/2208.07220>`_).

    Of ``P`` patches ``Q = max(1, round((1 - p) P))`` stay, in no order: their positions were added before.
    The class token, which comes first, always stays. In eval mode nothing is left out.

    Args:
        p: Share of the patches to leave out, in [0, 1).

    Shapes:
        - **input:** ``[N, 1 + P, F]``.
        - **output:** ``[N, 1 + Q, F]``; the input in eval mode.

    Raises:
        ConfigError: A share outside [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError("no share of the patches", "p", "from 0 on, below 1", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        patches = x.size(1) - 1
        kept = max(1, round((1 - self.p) * patches))
        if not self.training or kept == patches:
            return x
        chosen = torch.rand(x.size(0), patches, device=x.device).topk(kept, dim=1).indices + 1  # [N, Q]
        chosen = torch.cat([chosen.new_zeros(x.size(0), 1), chosen], dim=1)  # the class token is first
        return x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.size(2)))

    def extra_repr(self) -> str:
        return f"p={self.p}"
