from torch import Tensor, nn

from graphmoe.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    r"""`RMSNorm <https://arxiv.org/abs/1910.07467>`_ over the last dimension,
    :math:`y = w \odot x \,/ \sqrt{\mathrm{mean}(x^2) + \epsilon}`: torch's, by a kernel of fewer passes.

    Args:
        channels: Channels ``D``.
        eps: Added to the mean square.

    Shapes:
        - **input / output:** ``[*, D]``.
    """

    def __init__(self, channels: int, *, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
