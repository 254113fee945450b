import torch
from torch import Tensor


def rotary(
    position: Tensor, channels: int, *, theta: float = 1e4, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    r"""Cosine and sine of `rotary position embeddings <https://arxiv.org/abs/2104.09864>`_.

    Channel pair ``c`` of position ``t`` turns by the angle :math:`t\,\theta^{-2c/d}`.

    Args:
        position: Positions, ``[*]``.
        channels: Channels ``d`` of one head, even.
        theta: Base of the frequencies.
        dtype: Of the result; angles are computed in at least fp32.

    Returns:
        Two tensors ``[*, d / 2]``.
    """
    dtype = dtype or torch.get_default_dtype()
    precision = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, channels, 2, device=position.device, dtype=precision) / channels
    angle = position.to(precision).unsqueeze(-1) * theta**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs ``(c, c + d / 2)`` of ``x [*, d]`` by angles ``[*, d / 2]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
