"""A memory that lasts one episode: labelled examples are written into slots, from which others are told."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.nn.memory.memory_bank import MemoryBank
from graphmoe.nn.memory.recall_conv import RecallConv
from graphmoe.nn.memory.write_conv import WriteConv


class EpisodeState(NamedTuple):
    """What the memories of some episodes hold; nothing else of an episode is kept anywhere.

    Attributes:
        slots: Keys, ``[B, S, F]``; that of slots which nobody has written is learned, and nobody looks at it.
        values: Labels, ``[B, S, C]``: one-hot, times the gate with which they were written; else 0.
        steps: Examples written so far, ``[B]`` int64: the slots ``0 .. steps - 1``.
    """

    slots: Tensor
    values: Tensor
    steps: Tensor


class EpisodeMemory(nn.Module):
    r"""Slots of keys and labels (`MANN <https://arxiv.org/abs/1605.06065>`_): an example writes its key and
    its label into the next free slot, and a query recalls the labels of written slots by how near they are.

    .. math::
        g_n = \sigma(w^\top x_n + b), \quad
        V_s \leftarrow (1 - g_n e_n) \odot V_s + g_n W_u x_n, \quad c_s = g_n\,\mathrm{onehot}(y_n), \quad
        p_m = \sum_s \mathrm{softmax}_s\!\left(\log g_s - \tau\tfrac{\lVert W_q x_m - V_s\rVert^2}{\sqrt F}
        \right) \mathrm{onehot}(y_s)

    An example that is written faintly counts for less. Slots that nobody has written have no edges, so that
    it does not matter how many there are; the order of examples does not matter, either, nor which label
    has which number.

    Edges: example -> its slot; written slot -> query.

    Args:
        channels: Channels ``F`` of examples, keys and queries.
        num_slots: Slots ``S`` of an episode.
        num_labels: Labels ``C`` that it can tell apart.

    Shapes:
        - **write:** ``x [B, P, F]``, ``labels [B, P]`` int64 and maybe an :class:`EpisodeState` to go on
          from; returns the state afterwards.
        - **read:** the state, ``x [B, Q, F]`` and maybe ``hidden [B, Q]`` int64, a slot that a query may not
          look at, such as its own; returns probabilities ``[B, Q, C]``, all 0 where nothing may be looked at;
          with ``return_attention_weights=True`` also the attention ``[B, Q, S]``.

    Raises:
        ConfigError: No slot, more examples than slots, or a label out of range.
    """

    def __init__(self, channels: int, num_slots: int, num_labels: int):
        super().__init__()
        if num_slots < 1:
            raise ConfigError("a memory needs room", "num_slots", "at least 1", num_slots)
        self.channels, self.num_slots, self.num_labels = channels, num_slots, num_labels
        # One content for all slots: with one each, the order of examples would matter.
        self.bank = MemoryBank(1, channels)
        self.gate = nn.Linear(channels, 1)
        self.write_conv = WriteConv(channels, channels)
        self.recall_conv = RecallConv(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Examples start by being written as they are, nearly in full."""
        self.bank.reset_parameters()
        self.recall_conv.reset_parameters()
        nn.init.eye_(self.write_conv.lin_update.weight)
        for lin in (self.write_conv.lin_erase, self.gate):
            nn.init.zeros_(lin.weight)
            nn.init.constant_(lin.bias, 4.0)

    def empty(self, batch_size: int) -> EpisodeState:
        """Memories of ``batch_size`` episodes that have not begun."""
        slots = self.bank(batch_size).expand(-1, self.num_slots, -1)
        steps = torch.zeros(batch_size, dtype=torch.long, device=slots.device)
        return EpisodeState(slots, slots.new_zeros(batch_size, self.num_slots, self.num_labels), steps)

    def write(self, x: Tensor, labels: Tensor, state: EpisodeState | None = None) -> EpisodeState:
        batch, count, _ = x.shape
        state = self.empty(batch) if state is None else state
        self._check(labels, state, count)
        gate = self.gate(x).sigmoid().squeeze(-1)  # [B, P]
        place = state.steps.unsqueeze(1) + torch.arange(count, device=x.device)  # [B, P]
        slots = (
            self._fast(x, gate, place, state) if self.write_conv.fuse else self._along(x, gate, place, state)
        )
        label = F.one_hot(labels, self.num_labels).to(x.dtype) * gate.unsqueeze(-1)
        values = state.values.to(x.dtype).scatter(1, _over(place, label), label)
        return EpisodeState(slots, values, state.steps + count)

    def read(
        self,
        state: EpisodeState,
        x: Tensor,
        hidden: Tensor | None = None,
        *,
        return_attention_weights: bool = False,
    ):
        slot = torch.arange(self.num_slots, device=x.device)
        allowed = (slot < state.steps.unsqueeze(1)).unsqueeze(1)  # [B, 1, S]
        if hidden is not None:
            allowed = allowed & (slot != hidden.unsqueeze(-1))
        strength = state.values.sum(dim=-1)  # [B, S]
        label = state.values / strength.clamp(min=torch.finfo(strength.dtype).tiny).unsqueeze(-1)
        return self.recall_conv(
            (state.slots, x), label, edge_weight=strength,
            mask=allowed.expand(-1, x.size(1), -1), return_attention_weights=return_attention_weights,
        )  # fmt: skip

    def _fast(self, x: Tensor, gate: Tensor, place: Tensor, state: EpisodeState) -> Tensor:
        """Every example has a slot of its own, so that nothing has to be summed."""
        erase, update = self.write_conv.terms(x)
        gate = gate.unsqueeze(-1)
        old = state.slots.gather(1, _over(place, x))
        return state.slots.scatter(1, _over(place, x), (1 - gate * erase) * old + gate * update)

    def _along(self, x: Tensor, gate: Tensor, place: Tensor, state: EpisodeState) -> Tensor:
        """The same along the edges ``example -> slot``."""
        target = place + self.num_slots * torch.arange(len(x), device=x.device).unsqueeze(1)
        edges = torch.stack([torch.arange(target.numel(), device=x.device), target.flatten()])
        flat = (x.flatten(0, 1), state.slots.flatten(0, 1))
        return self.write_conv(flat, edges, gate=gate.flatten()).view_as(state.slots)

    def _check(self, labels: Tensor, state: EpisodeState, count: int) -> None:
        most = int(state.steps.max()) + count if len(state.steps) else 0
        if most > self.num_slots:
            what = "more examples than the memory has room for"
            raise ConfigError(what, "num_slots", f"at least {most}", self.num_slots)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_labels:
            got = (int(labels.min()), int(labels.max()))
            raise ConfigError("label out of range", "labels", f"in [0, {self.num_labels})", got)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channels}, slots={self.num_slots}, labels={self.num_labels})"


def _over(place: Tensor, like: Tensor) -> Tensor:
    """Places ``[B, P]`` as an index of every channel of ``like [B, P, *]``."""
    return place.unsqueeze(-1).expand_as(like)
