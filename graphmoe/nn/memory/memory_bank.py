import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError


class MemoryBank(nn.Module):
    r"""The learned contents with which the slots of every sequence start.

    .. math::
        V^0_{bs} = v_s, \qquad v_s \sim \mathcal N(0, 0.02^2) \text{ at the start of training}

    Args:
        num_slots: ``S``.
        channels: Channels ``F`` of a slot.

    Shapes:
        - **input:** number of sequences ``B``.
        - **output:** ``[B, S, F]``.

    Raises:
        ConfigError: No slot or no channel.
    """

    def __init__(self, num_slots: int, channels: int):
        super().__init__()
        for name, value in (("num_slots", num_slots), ("channels", channels)):
            if value < 1:
                raise ConfigError("a memory needs room", name, "at least 1", value)
        self.num_slots, self.channels = num_slots, channels
        self.slots = nn.Parameter(torch.empty(num_slots, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slots, std=0.02)

    def forward(self, batch_size: int) -> Tensor:
        return self.slots.expand(batch_size, -1, -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_slots}, {self.channels})"
