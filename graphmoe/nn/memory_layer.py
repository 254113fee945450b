from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from graphmoe.errors import ConfigError
from graphmoe.nn.memory import MemoryBank, ReadConv, WriteConv
from graphmoe.nn.route import DenseRouter, TopKRouter
from graphmoe.typing import MemoryRecord, MemoryState, Routing


class MemoryLayer(nn.Module):
    r"""A memory of few slots for each sequence, written and read token by token along routed edges.

    At step :math:`t` of a sequence the token :math:`x_t` has ``k`` slots, chosen by one router for reading
    and writing, with weights :math:`w`:

    .. math::
        r_t = \mathrm{ReadConv}(V^{t-1}, x_t, w), \qquad
        V^t = \mathrm{WriteConv}(x_t, V^{t-1}, w, g_t), \qquad y_t = W_o r_t

    A token reads *before* it writes, so it hears what earlier tokens of its own sequence wrote, and nobody
    else. The gate is :math:`g_t = \sigma(w_g^\top x_t + b)`, and then all steps of all slots are applied side
    by side, as writing needs nothing that was read; with ``read_dependent_gate`` it is
    :math:`\sigma(w_g^\top [r_t \,\|\, x_t] + b)`, one step after another.

    With ``binding`` what is written is multiplied by :math:`W_w p_t` and what is read by :math:`W_r p_t`,
    :math:`p_t` being the ``key`` of the token: several tokens then share a slot without being mixed up.

    Forward changes nothing in the layer: contents come in and go out as a
    :class:`~graphmoe.typing.MemoryState`, and passing one on is the same as one long sequence.

    Edges: slot -> token, then token -> slot.

    Args:
        channels: Channels ``D`` of tokens and slots.
        num_slots: ``S``.
        k: Slots a token, ``1 <= k <= S``; ``k = S`` is a dense memory.
        heads: Attention heads of reading; must divide ``D``.
        binding: Bind what is written to a key.
        read_dependent_gate: Let the gate see what was read.
        temperature: Of the router.
        router_hidden: Channels of the hidden layer of the router; 0: none. Default: ``D / 2``.

    Shapes:
        - **input:** ``x [B, T, D]``; ``mask [B, T]`` bool, False for padding, which has no edges; ``state``,
          or ``None`` for a sequence that begins; ``key [B, T, D]`` with ``binding``; ``write [B, T]`` bool:
          False for tokens that only read; ``thin``: what takes some edges of a
          :class:`~graphmoe.typing.Routing` away.
        - **output:** what was read ``[B, T, D]``, 0 for padding, to be added by the caller;
          :class:`~graphmoe.typing.MemoryState`; :class:`~graphmoe.typing.MemoryRecord`.

    Raises:
        ConfigError: ``k`` outside ``[1, S]``, heads that do not divide ``D``, a ``key`` without ``binding``
            or the other way round, a state or a mask of other sizes.
    """

    def __init__(
        self,
        channels: int,
        num_slots: int,
        k: int = 2,
        heads: int = 4,
        *,
        binding: bool = False,
        read_dependent_gate: bool = False,
        temperature: float = 1.0,
        router_hidden: int | None = None,
    ):
        super().__init__()
        if not 1 <= k <= num_slots:
            raise ConfigError("k must not exceed the number of slots", "k", f"1 <= k <= {num_slots}", k)
        self.channels, self.num_slots, self.k, self.heads = channels, num_slots, k, heads
        self.read_dependent_gate = read_dependent_gate
        width = channels // 2 if router_hidden is None else router_hidden
        self.hidden = nn.Sequential(nn.Linear(channels, width), nn.ReLU()) if width else None
        options = {"temperature": temperature}
        if k == num_slots:
            self.router = DenseRouter(width or channels, num_slots, **options)
        else:
            self.router = TopKRouter(width or channels, num_slots, k, **options)
        self.bank = MemoryBank(num_slots, channels)
        self.read = ReadConv(channels, channels, heads)
        self.write = WriteConv(channels, channels)
        self.lin_gate = nn.Linear(2 * channels if read_dependent_gate else channels, 1)
        self.lin_write_key = nn.Linear(channels, channels, bias=False) if binding else None
        self.lin_read_key = nn.Linear(channels, channels, bias=False) if binding else None
        self.lin_out = nn.Linear(channels, channels, bias=False)
        for module in self.modules():
            if isinstance(module, MessagePassing):
                module.explain = False  # an Explainer around this layer masks the edges of another graph
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.hidden is not None:
            self.hidden[0].reset_parameters()
        for module in (self.router, self.bank, self.read, self.write, self.lin_gate, self.lin_out):
            module.reset_parameters()
        for lin in (self.lin_write_key, self.lin_read_key):
            if lin is not None:
                lin.reset_parameters()
        nn.init.ones_(self.lin_gate.bias)  # tokens write from the first step on

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: MemoryState | None = None,
        *,
        key: Tensor | None = None,
        write: Tensor | None = None,
        thin: Callable[[Routing], Routing] | None = None,
    ) -> tuple[Tensor, MemoryState, MemoryRecord]:
        slots, steps = self._start(x, mask, state, key, write)
        batch, length = x.shape[:2]
        flat = None if mask is None else mask.flatten()
        routing = self.route(x.flatten(0, 1), flat)
        routing = routing if thin is None else thin(routing)
        slot, weight = in_token_order(routing, self.k)  # [N, k]
        # Absent edges have weight 0, which changes nothing; spread over the slots they hold nobody up.
        token = torch.arange(len(slot), device=x.device)
        slot = torch.where(slot < self.num_slots, slot, token.unsqueeze(1) % self.num_slots)
        may = torch.ones_like(token, dtype=torch.bool) if write is None else write.flatten()
        key_w = None if key is None else self.lin_write_key(key.flatten(0, 1))
        step = self._step_by_step if self.read_dependent_gate else self._side_by_side
        heard, slots, alpha, gate = step(x, slots, slot, weight, may, key_w)
        if key is not None:
            heard = heard * self.lin_read_key(key.flatten(0, 1))
        out = self.lin_out(heard).view(x.shape)
        steps = steps + (length if mask is None else mask.sum(dim=1))
        return out, MemoryState(slots, steps), MemoryRecord(routing, alpha, gate, flat)

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """The slots of tokens ``x [N, D]``, in at least fp32 whatever autocast says."""
        if self.hidden is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            lin = self.hidden[0]
            with torch.autocast(x.device.type, enabled=False):
                x = nn.functional.linear(x.to(dtype), lin.weight.to(dtype), lin.bias.to(dtype)).relu()
        return self.router(x, mask=mask)

    def _side_by_side(
        self, x: Tensor, slots: Tensor, slot: Tensor, weight: Tensor, may: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All steps at once: what was read ``[N, D]``, the slots afterwards, attention and gates."""
        batch, length, channels = x.shape
        x = x.flatten(0, 1)
        gate = self.lin_gate(x).sigmoid().squeeze(1) * may
        token = torch.arange(x.size(0), device=x.device)
        sequence = token.div(max(length, 1), rounding_mode="floor")
        place = (slot + sequence.unsqueeze(1) * self.num_slots).flatten()
        edges = torch.stack([token.repeat_interleave(self.k), place])
        after, before = self.write(
            (x, slots.flatten(0, 1)), edges, weight.flatten(), gate, edges[0], key=key, return_before=True
        )
        near = before.view(-1, self.k, channels)
        heard, alpha = self.read((near, x), edge_weight=weight, return_attention_weights=True)
        return heard, after.view(batch, self.num_slots, channels), alpha, gate

    def _step_by_step(
        self, x: Tensor, slots: Tensor, slot: Tensor, weight: Tensor, may: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_side_by_side`, with gates that see what was read."""
        batch, length, channels = x.shape
        terms = (t.to(slots.dtype) for t in self.write.terms(x.flatten(0, 1), key))
        erase, update = (t.view(batch, length, 1, channels) for t in terms)
        slot, weight = (t.view(batch, length, self.k) for t in (slot, weight))
        may = may.view(batch, length, 1)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(length):
            place = slot[:, t].unsqueeze(-1).expand(-1, -1, channels)
            near = slots.gather(1, place)  # [B, k, D]
            heard, alpha = self.read((near, x[:, t]), None, weight[:, t], True)
            gate = self.lin_gate(torch.cat([heard, x[:, t]], dim=1)).sigmoid() * may[:, t]  # [B, 1]
            strength = (weight[:, t] * gate).unsqueeze(-1).to(slots.dtype)
            # Added, not set: an absent edge may meet a present one in its slot.
            slots = slots.scatter_add(1, place, strength * (update[:, t] - erase[:, t] * near))
            found.append((heard, alpha, gate))
        if not found:
            empty = x.new_zeros(0, channels)
            return empty, slots, x.new_zeros(0, self.heads, self.k), x.new_zeros(0)
        heard, alpha, gate = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
        return heard, slots, alpha, gate.squeeze(1)

    def _start(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: MemoryState | None,
        key: Tensor | None,
        write: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Contents and steps before the first token, after a look at the arguments."""
        if x.dim() != 3 or x.size(2) != self.channels:
            raise ConfigError("not sequences of tokens", "x", f"[B, T, {self.channels}]", tuple(x.shape))
        if (key is None) != (self.lin_write_key is None):
            expected = "[B, T, D]" if key is None else "none without binding"
            raise ConfigError("key does not fit the memory", "key", expected, None if key is None else "one")
        sizes = {"mask": (mask, x.shape[:2]), "write": (write, x.shape[:2]), "key": (key, x.shape)}
        for name, (value, shape) in sizes.items():
            if value is not None and value.shape != shape:
                raise ConfigError("of another size", name, list(shape), tuple(value.shape))
        batch = x.size(0)
        if state is None:
            return self.bank(batch), torch.zeros(batch, dtype=torch.long, device=x.device)
        shape = (batch, self.num_slots, self.channels)
        if state.slots.shape != shape or state.steps.shape != (batch,):
            raise ConfigError("of another size", "state", list(shape), tuple(state.slots.shape))
        return state

    def extra_repr(self) -> str:
        gate = ", read_dependent_gate=True" if self.read_dependent_gate else ""
        binding = ", binding=True" if self.lin_write_key is not None else ""
        return f"{self.channels}, num_slots={self.num_slots}, k={self.k}{binding}{gate}"


def in_token_order(routing: Routing, k: int) -> tuple[Tensor, Tensor]:
    """Slot (or expert) of each place of tokens with ``k`` places, and its weight, each ``[N, k]``."""
    expert = torch.empty_like(routing.expert).scatter(0, routing.perm, routing.expert)
    weight = torch.zeros_like(routing.weight).scatter(0, routing.perm, routing.weight)
    return expert.view(-1, k), weight.view(-1, k)
