"""The memory of a differentiable neural computer: three ways to take one and the same step."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.graph import complete
from graphmoe.nn.memory.addressing import (
    ContentConv,
    SlotWriteConv,
    content_weights,
    erase_and_write,
    read_weighting,
    strength,
    write_weighting,
)
from graphmoe.nn.memory.allocation import allocation_weights, retention, usage
from graphmoe.nn.memory.linkage import LinkConv, backward_weights, forward_weights, link, precedence
from graphmoe.ops.dnc_step import dnc_step, interface_parts


class SlotState(NamedTuple):
    """What the slots of each sample hold between two steps.

    Attributes:
        memory: ``[B, S, W]``.
        usage: ``[B, S]`` in [0, 1].
        link: ``[B, S, S]`` (later, earlier), diagonal 0, rows and columns sum to at most 1.
        precedence: ``[B, S]``, sums to at most 1.
        read_weights: ``[B, R, S]``, each row sums to at most 1.
        write_weights: ``[B, S]``, sums to at most 1.
    """

    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor


class Interface(NamedTuple):
    """What the controller tells the memory.

    Attributes:
        read_keys: ``[B, R, W]``.
        read_strengths: ``[B, R]``, at least 1.
        write_key: ``[B, 1, W]``.
        write_strength: ``[B, 1]``, at least 1.
        erase: ``[B, W]`` in [0, 1].
        vector: What to write, ``[B, W]``.
        free_gates: ``[B, R]`` in [0, 1].
        allocation_gate: ``[B, 1]`` in [0, 1].
        write_gate: ``[B, 1]`` in [0, 1].
        modes: Backward, content, forward: ``[B, R, 3]``, sums to 1.
    """

    read_keys: Tensor
    read_strengths: Tensor
    write_key: Tensor
    write_strength: Tensor
    erase: Tensor
    vector: Tensor
    free_gates: Tensor
    allocation_gate: Tensor
    write_gate: Tensor
    modes: Tensor


def parse_interface(raw: Tensor, heads: int, width: int) -> Interface:
    """Split an interface vector ``[B, W R + 3 W + 5 R + 3]`` and bound its parts."""
    keys, vector, strengths, gates, modes = raw.split(interface_parts(heads, width), dim=1)
    keys, strengths = keys.unflatten(1, (heads + 1, width)), strength(strengths)
    erase, free, allocate, write = torch.sigmoid(gates).split((width, heads, 1, 1), dim=1)
    modes = torch.softmax(modes.unflatten(1, (heads, 3)), dim=-1)
    return Interface(
        keys[:, :heads], strengths[:, :heads], keys[:, heads:], strengths[:, heads:],
        erase, vector, free, allocate, write, modes,
    )  # fmt: skip


def memory_step(state: SlotState, told: Interface) -> tuple[SlotState, Tensor]:
    """The equations of the paper one by one, in tensors of all slots; what is read is ``[B, R, W]``."""
    used = usage(state.usage, state.write_weights, retention(told.free_gates, state.read_weights))
    alike = content_weights(state.memory, told.write_key, told.write_strength).squeeze(1)
    write = write_weighting(allocation_weights(used), alike, told.allocation_gate, told.write_gate)
    memory = erase_and_write(state.memory, write, told.erase, told.vector)
    links = link(state.link, write, state.precedence)
    before = backward_weights(links, state.read_weights)
    after = forward_weights(links, state.read_weights)
    found = content_weights(memory, told.read_keys, told.read_strengths)
    read = read_weighting(before, found, after, told.modes)
    last = precedence(state.precedence, write)
    return SlotState(memory, used, links, last, read, write), read @ memory


class DNCMemory(nn.Module):
    r"""Slots with usage, write order and content that heads write and read, without parameters.

    From `"Hybrid computing using a neural network with dynamic external memory"
    <https://www.nature.com/articles/nature20101>`_ (2016): :func:`memory_step`. As a graph, heads hear slots
    by content (:class:`ContentConv`), a controller writes slots (:class:`SlotWriteConv`), and slots precede
    slots (:class:`LinkConv`). The fast form is one operation, :func:`~graphmoe.ops.dnc_step.dnc_step`.

    Args:
        heads: Read heads ``R``.
        width: Channels ``W`` of a slot.

    Shapes:
        - **input:** :class:`SlotState`, interface vectors ``[B, W R + 3 W + 5 R + 3]``.
        - **output:** the state after the step, what was read ``[B, R, W]``, and how far the step allocates,
          ``[B, 1]``.

    Raises:
        ConfigError: No heads, no channels, no slots, or an interface of another size.
    """

    def __init__(self, heads: int, width: int):
        super().__init__()
        for name, value in (("heads", heads), ("width", width)):
            if value < 1:
                raise ConfigError("a memory has at least one", name, "at least 1", value)
        self.heads, self.width = heads, width
        # They have no fast form of their own: their `fuse` says which form of the whole step is taken.
        self.content, self.write, self.link = ContentConv(), SlotWriteConv(), LinkConv()
        for conv in (self.content, self.write, self.link):
            conv.fuse = True

    @property
    def fuse(self) -> bool:
        """Whether the fast form is taken: unless some relation passes messages edge by edge."""
        return all(conv.fuse for conv in (self.content, self.write, self.link))

    @property
    def interface_size(self) -> int:
        """Channels of an interface vector."""
        return sum(interface_parts(self.heads, self.width))

    def initial_state(self, batch_size: int, num_slots: int, like: Tensor) -> SlotState:
        """A memory that is empty but for a constant; of the device of ``like``, at least of single precision.

        Raises:
            ConfigError: No slots.
        """
        if num_slots < 1:
            raise ConfigError("a memory has slots", "num_slots", "at least 1", num_slots)
        dtype = torch.promote_types(like.dtype, torch.float32)

        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(batch_size, *shape, dtype=dtype)

        return SlotState(
            zeros(num_slots, self.width) + 1e-6,
            zeros(num_slots),
            zeros(num_slots, num_slots),
            zeros(num_slots),
            zeros(self.heads, num_slots),
            zeros(num_slots),
        )

    def forward(self, state: SlotState, interface: Tensor) -> tuple[SlotState, Tensor, Tensor]:
        if interface.size(-1) != self.interface_size:
            got = tuple(interface.shape)
            raise ConfigError("not an interface vector", "interface", f"[B, {self.interface_size}]", got)
        # A usage or a product of usages in half precision would round to 1 and free no slot.
        with torch.autocast(interface.device.type, enabled=False):
            told = interface.to(state.memory.dtype)
            if self.fuse:
                *slots, reads, allocates = dnc_step(*state, told)
                return SlotState(*slots), reads.to(interface.dtype), allocates
            told = parse_interface(told, self.heads, self.width)
            new, reads = self._edges(state, told)
            return new, reads.to(interface.dtype), (told.allocation_gate * told.write_gate).detach()

    def _edges(self, state: SlotState, told: Interface) -> tuple[SlotState, Tensor]:
        """The step as messages: the slots of all samples are one graph without edges between samples."""
        batch, slots, _ = state.memory.shape
        sample = torch.arange(batch, device=state.memory.device)
        slot = torch.arange(batch * slots, device=sample.device)
        own = slot.div(slots, rounding_mode="floor")  # sample of each slot
        head = torch.arange(self.heads, device=sample.device)
        answers = torch.stack(
            [slot.repeat_interleave(self.heads), (own.unsqueeze(1) * self.heads + head).flatten()]
        )
        pairs = complete(slots, device=sample.device)
        precedes = (pairs.unsqueeze(1) + slots * sample.unsqueeze(1)).flatten(1)
        memory, used = state.memory.flatten(0, 1), usage(
            state.usage, state.write_weights, retention(told.free_gates, state.read_weights)
        )  # fmt: skip
        to_controller = torch.stack([slot, own])
        alike = self.content(
            memory, told.write_key.flatten(0, 1), told.write_strength.flatten(), to_controller
        )[1]
        write = write_weighting(
            allocation_weights(used), alike.view(batch, slots), told.allocation_gate, told.write_gate
        )
        memory = self.write(memory, told.erase, told.vector, to_controller.flip(0), write.flatten())
        edge = (sample.unsqueeze(1), pairs[1], pairs[0])
        links = self.link.relink(state.link[edge].flatten(), precedes, write.flatten(),
                                 state.precedence.flatten())  # fmt: skip
        heads = state.read_weights.mT.flatten(0, 1)  # [B * S, R]
        shape = (batch, slots, self.heads)
        after = self.link(heads, precedes, links).view(shape).mT
        before = self.link(heads, precedes.flip(0), links).view(shape).mT
        _, found = self.content(memory, told.read_keys.flatten(0, 1), told.read_strengths.flatten(), answers)
        read = read_weighting(before, found.view(shape).mT, after, told.modes)
        memory = memory.view_as(state.memory)
        dense = torch.zeros_like(state.link).index_put(edge, links.view(batch, -1))
        last = precedence(state.precedence, write)
        return SlotState(memory, used, dense, last, read, write), read @ memory

    def extra_repr(self) -> str:
        return f"heads={self.heads}, width={self.width}"
