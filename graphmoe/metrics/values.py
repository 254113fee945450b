"""What the measures share."""

import math

import torch
from torch import Tensor

from graphmoe.errors import ConfigError

LN2 = math.log(2)


def to_float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def live_experts(values: Tensor, live: Tensor | None) -> Tensor:
    return torch.ones(values.size(0), dtype=torch.bool, device=values.device) if live is None else live


def at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError("too small", name, "at least 1", number)
