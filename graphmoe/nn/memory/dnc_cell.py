from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.nn.memory.dnc_memory import DNCMemory, SlotState
from graphmoe.ops.dnc_sequence import dnc_sequence
from graphmoe.ops.dnc_step import interface_parts


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
    r"""A differentiable neural computer: an LSTM that writes and reads slots.

    From `"Hybrid computing using a neural network with dynamic external memory"
    <https://www.nature.com/articles/nature20101>`_ (2016):

    .. math::
        h_t, c_t = \mathrm{LSTM}([x_t; r_{t-1}], h_{t-1}, c_{t-1}), \qquad
        M_t, r_t = \mathrm{memory}(M_{t-1}, W_\xi h_t)

    The number of slots belongs to the state, not to the parameters: a trained cell works on more of them. The
    fast form is one operation over all steps, :func:`~graphmoe.ops.dnc_sequence.dnc_sequence`; with
    ``fuse = False``, as in :func:`~graphmoe.nn.edge_form`, every step passes messages.

    Args:
        in_channels: Channels of an input.
        hidden_channels: Channels ``H`` of the controller.
        heads: Read heads ``R``.
        slot_channels: Channels ``W`` of a slot.
        content_bias: Start of the bias of reading by content, against reading along links. Read weights start
            at 0 and links only pass them on, so that a head that leaves content early reads nothing.
        write_bias: Start of the biases of the write gate and of the allocation gate, which is then open for
            slots that are free.

    Shapes:
        - **input:** ``x [B, T, in_channels]``, :class:`DNCState` (or ``None`` and ``num_slots``).
        - **output:** ``[r_t; h_t]``, ``[B, T, R W + H]``, and the state after the last step; with
          ``return_states=True`` also the states after every step, and how far each allocates, ``[T, B, 1]``.

    Raises:
        ConfigError: No channels, heads or slots.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        heads: int = 1,
        slot_channels: int = 16,
        content_bias: float = 0.0,
        write_bias: float = 0.0,
    ):
        super().__init__()
        if hidden_channels < 1:
            raise ConfigError("a controller has channels", "hidden_channels", "at least 1", hidden_channels)
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.content_bias, self.write_bias = content_bias, write_bias
        self.memory = DNCMemory(heads, slot_channels)
        self.lin_input = nn.Linear(in_channels, 4 * hidden_channels)
        self.lin_state = nn.Linear(heads * slot_channels + hidden_channels, 4 * hidden_channels, bias=False)
        self.lin_interface = nn.Linear(hidden_channels, self.memory.interface_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights; the controller starts to remember, with a forget gate of sigmoid(1)."""
        for lin, bound in self.bounds():
            nn.init.uniform_(lin.weight, -bound, bound)
        nn.init.zeros_(self.lin_input.bias)
        with torch.no_grad():
            self.lin_interface.bias.copy_(self.interface_start())
            self.lin_input.bias[self.hidden_channels : 2 * self.hidden_channels] = 1

    def bounds(self) -> tuple[tuple[nn.Linear, float], ...]:
        """The maps, and how far from 0 their weights start at most.

        The interface starts three times as far as a linear map would, so that steps differ in what they
        write: between slots that all hold the same, reading could not learn to choose.
        """
        recurrent = self.hidden_channels**-0.5
        inputs = self.in_channels**-0.5
        return (self.lin_input, inputs), (self.lin_state, recurrent), (self.lin_interface, 3 * recurrent)

    def interface_start(self) -> Tensor:
        """The bias of the interface before training, ``[W R + 3 W + 5 R + 3]``."""
        heads = self.memory.heads
        start = torch.zeros_like(self.lin_interface.bias)
        *_, gates, modes = start.split(interface_parts(heads, self.memory.width))
        gates[-2:] = self.write_bias  # allocation gate and write gate
        modes.view(heads, 3)[:, 1] = self.content_bias
        return start

    @property
    def out_channels(self) -> int:
        """Channels of an output."""
        return self.memory.heads * self.memory.width + self.hidden_channels

    def initial_state(self, batch_size: int, num_slots: int) -> DNCState:
        """The state before the first step."""
        weight = self.lin_input.weight
        slots = self.memory.initial_state(batch_size, num_slots, weight)
        zeros = slots.memory.new_zeros(batch_size, self.out_channels)
        reads, hidden = zeros.split((zeros.size(1) - self.hidden_channels, self.hidden_channels), dim=1)
        return DNCState(*slots, reads, hidden, hidden)

    def forward(
        self,
        x: Tensor,
        state: DNCState | None = None,
        num_slots: int | None = None,
        return_states: bool = False,
    ):
        if state is None:
            state = self.initial_state(x.size(0), num_slots or 0)
        projected = self.lin_input(x).transpose(0, 1).to(state.memory.dtype)  # [T, B, 4 H]
        weights = (self.lin_state.weight, self.lin_interface.weight, self.lin_interface.bias)
        weights = [weight.to(state.memory.dtype) for weight in weights]
        # In half precision a usage would round to 1, and no slot would be free again.
        with torch.autocast(x.device.type, enabled=False):
            if self.memory.fuse and not return_states:
                outputs, state, _ = dnc_sequence(projected, state, *weights)
                return outputs.transpose(0, 1).to(x.dtype), DNCState(*state)
            outputs, states, gates = [], [], []
            for given in projected:
                state, gate = self._step(given, state, *weights)
                outputs.append(torch.cat((state.reads, state.hidden), dim=1))
                states.append(state)
                gates.append(gate)
        outputs = torch.stack(outputs, dim=1).to(x.dtype)
        return (outputs, state, states, torch.stack(gates)) if return_states else (outputs, state)

    def _step(self, given: Tensor, state: DNCState, recurrent: Tensor, interface: Tensor, bias: Tensor):
        """One step by itself: the state behind it, and how far it allocates."""
        gates = torch.addmm(given, torch.cat((state.reads, state.hidden), dim=1), recurrent.t())
        enter, forget, leave, new = gates.chunk(4, dim=1)
        cell = torch.sigmoid(forget) * state.cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        told = torch.addmm(bias, hidden, interface.t())
        slots, reads, allocates = self.memory(SlotState(*state[:6]), told)
        return DNCState(*slots, reads.flatten(1), hidden, cell), allocates
