from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.nn.memory.dnc_memory import DNCMemory, SlotState


class DNCState(NamedTuple):
    """All that a differentiable neural computer knows between two steps, one row a sample.

    Attributes:
        memory, usage, link, precedence, read_weights, write_weights: See
            :class:`~graphmoe.nn.memory.SlotState`.
        reads: What was read in the last step, ``[B, R W]``.
        hidden: Output of the controller, ``[B, H]``.
        cell: Cell of the controller, ``[B, H]``.
    """

    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor
    reads: Tensor
    hidden: Tensor
    cell: Tensor


class DNCCell(nn.Module):
    r"""One step of a differentiable neural computer: an LSTM that writes and reads slots.

    From `"Hybrid computing using a neural network with dynamic external memory"
    <https://www.nature.com/articles/nature20101>`_ (2016):

    .. math::
        h_t, c_t = \mathrm{LSTM}([x_t; r_{t-1}], h_{t-1}, c_{t-1}), \qquad
        M_t, r_t = \mathrm{memory}(M_{t-1}, W_\xi h_t)

    The number of slots belongs to the state, not to the parameters: a trained cell works on more of them.

    Args:
        in_channels: Channels of an input.
        hidden_channels: Channels ``H`` of the controller.
        heads: Read heads ``R``.
        slot_channels: Channels ``W`` of a slot.

    Shapes:
        - **input:** ``x [B, in_channels]``, :class:`DNCState`.
        - **output:** ``[h_t; r_t] [B, H + R W]``, the state after the step, and how far the step allocates,
          ``[B, 1]``.
    """

    def __init__(self, in_channels: int, hidden_channels: int, heads: int = 1, slot_channels: int = 16):
        super().__init__()
        if hidden_channels < 1:
            raise ConfigError("a controller has channels", "hidden_channels", "at least 1", hidden_channels)
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.memory = DNCMemory(heads, slot_channels)
        self.lin_input = nn.Linear(in_channels, 4 * hidden_channels)
        self.lin_state = nn.Linear(heads * slot_channels + hidden_channels, 4 * hidden_channels, bias=False)
        self.lin_interface = nn.Linear(hidden_channels, self.memory.interface_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights; the controller starts to remember, with a forget gate of sigmoid(1)."""
        for lin in (self.lin_input, self.lin_state):
            nn.init.uniform_(lin.weight, -(self.hidden_channels**-0.5), self.hidden_channels**-0.5)
        self.lin_interface.reset_parameters()
        nn.init.zeros_(self.lin_input.bias)
        with torch.no_grad():
            self.lin_input.bias[self.hidden_channels : 2 * self.hidden_channels] = 1

    @property
    def out_channels(self) -> int:
        return self.hidden_channels + self.memory.heads * self.memory.width

    def initial_state(self, batch_size: int, num_slots: int) -> DNCState:
        """The state before the first step."""
        weight = self.lin_input.weight
        zeros = weight.new_zeros(batch_size, self.out_channels)
        hidden, reads = zeros.split((self.hidden_channels, zeros.size(1) - self.hidden_channels), dim=1)
        return DNCState(*self.memory.initial_state(batch_size, num_slots, weight), reads, hidden, hidden)

    def forward(self, x: Tensor, state: DNCState) -> tuple[Tensor, DNCState, Tensor]:
        return self.step(self.lin_input(x), state)

    def step(self, projected: Tensor, state: DNCState) -> tuple[Tensor, DNCState, Tensor]:
        """:meth:`forward` of an input that ``lin_input`` was applied to, as can be done for all steps at once."""
        gates = projected + self.lin_state(torch.cat((state.reads, state.hidden), dim=1))
        hidden, cell = lstm_update(gates, state.cell)
        slots, reads, allocates = self.memory(SlotState(*state[:6]), self.lin_interface(hidden))
        reads = reads.flatten(1)
        return torch.cat((hidden, reads), dim=1), DNCState(*slots, reads, hidden, cell), allocates


def lstm_update(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Output and cell ``[B, H]`` of an LSTM from its gates before the nonlinearity, ``[B, 4 H]`` (input,
    forget, cell, output)."""
    opened, forget, new, out = gates.chunk(4, dim=1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(opened) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(cell), cell
