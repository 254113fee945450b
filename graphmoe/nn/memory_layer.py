from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import to_dense_batch

from graphmoe.errors import ConfigError
from graphmoe.nn.budget import in_token_order
from graphmoe.nn.memory import MemoryBank, ReadConv, WriteConv
from graphmoe.nn.route import DenseRouter, TopKRouter
from graphmoe.typing import MemoryRecord, MemoryState, Routing

ADDRESSES = ("token", "key")


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
        address: What the router looks at: the ``token``, or its ``key``.
        read_dependent_gate: Let the gate see what was read.
        temperature: Of the router.
        router_hidden: Channels of the hidden layer of the router; 0: none. Default: ``D / 2``.

    Shapes:
        - **input:** ``x [B, T, D]``, or the tokens of all sequences one after another, ``x [N, D]``, with
          ``batch [N]``, the ascending number of the sequence of each; ``mask [B, T]`` bool, False for
          padding, which has no edges and which ``batch`` has no use for; ``state``, or ``None`` for
          sequences that begin (then as many as ``batch_size``, or as ``batch`` names); ``key`` as ``x``, with
          ``binding`` or such an ``address``; ``write [B, T]`` or ``[N]`` bool: False for
          tokens that only read; ``thin``: what takes some edges of a
          :class:`~graphmoe.typing.Routing` away.
        - **output:** what was read, as ``x``, 0 for padding, to be added by the caller;
          :class:`~graphmoe.typing.MemoryState`; :class:`~graphmoe.typing.MemoryRecord`.

    Raises:
        ConfigError: ``k`` outside ``[1, S]``, heads that do not divide ``D``, a ``key`` without ``binding``
            or the other way round, a state or a mask of other sizes, tokens ``[N, D]`` without ``batch``.
    """

    def __init__(
        self,
        channels: int,
        num_slots: int,
        k: int = 2,
        heads: int = 4,
        *,
        binding: bool = False,
        address: str = "token",
        read_dependent_gate: bool = False,
        temperature: float = 1.0,
        router_hidden: int | None = None,
    ):
        super().__init__()
        if not 1 <= k <= num_slots:
            raise ConfigError("k must not exceed the number of slots", "k", f"1 <= k <= {num_slots}", k)
        self.channels, self.num_slots, self.k, self.heads = channels, num_slots, k, heads
        if address not in ADDRESSES:
            raise ConfigError("unknown address", "address", f"one of {', '.join(ADDRESSES)}", address)
        self.by_key, self.read_dependent_gate = address == "key", read_dependent_gate
        width = channels // 2 if router_hidden is None else router_hidden
        options = {"temperature": temperature, "hidden_channels": width or None}
        if k == num_slots:
            self.router = DenseRouter(channels, num_slots, **options)
        else:
            self.router = TopKRouter(channels, num_slots, k, **options)
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
        batch: Tensor | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, MemoryState, MemoryRecord]:
        self._check(x, batch, {"mask": mask, "write": write, "key": key})
        if batch is None:
            token = torch.arange(x.shape[:2].numel(), device=x.device)
            batch, batch_size = token.div(max(x.size(1), 1), rounding_mode="floor"), x.size(0)
        slots, steps = self._start(state, batch, batch_size)
        flat = None if mask is None else mask.flatten()
        tokens = x.reshape(-1, self.channels)  # [N, D]
        key = None if key is None else key.reshape(-1, self.channels)
        routing = self.router(key if self.by_key else tokens, mask=flat)
        routing = routing if thin is None else thin(routing)
        slot, weight = in_token_order(routing, self.k)  # [N, k]
        # Absent edges have weight 0, which changes nothing; spread over the slots they hold nobody up.
        token = torch.arange(len(slot), device=x.device)
        slot = torch.where(slot < self.num_slots, slot, token.unsqueeze(1) % self.num_slots)
        may = torch.ones_like(batch, dtype=torch.bool) if write is None else write.flatten()
        bound = None if self.lin_write_key is None else self.lin_write_key(key)
        parts = [tokens, batch, slot, weight, may, bound]
        keep = None if flat is None else flat.nonzero().squeeze(1)
        if keep is not None:  # padding takes no time
            parts = [None if part is None else part.index_select(0, keep) for part in parts]
        pass_on = self._step_by_step if self.read_dependent_gate else self._side_by_side
        heard, slots, alpha, gate = pass_on(slots, *parts)
        if keep is not None:
            heard, alpha, gate = (
                t.new_zeros(len(slot), *t.shape[1:]).index_copy(0, keep, t) for t in (heard, alpha, gate)
            )
        if self.lin_read_key is not None:
            heard = heard * self.lin_read_key(key)
        steps = steps + torch.bincount(parts[1], minlength=len(slots))
        return (
            self.lin_out(heard).view(x.shape),
            MemoryState(slots, steps),
            MemoryRecord(routing, alpha, gate, flat),
        )

    def _side_by_side(
        self,
        slots: Tensor,
        x: Tensor,
        sequence: Tensor,
        slot: Tensor,
        weight: Tensor,
        may: Tensor,
        key: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All steps of tokens ``x [N, D]`` at once: what was read ``[N, D]``, the slots afterwards, attention
        and gates."""
        gate = self.lin_gate(x).sigmoid().squeeze(1) * may
        token = torch.arange(x.size(0), device=x.device)
        place = (slot + sequence.unsqueeze(1) * self.num_slots).flatten()
        edges = torch.stack([token.repeat_interleave(self.k), place])
        after, before = self.write(
            (x, slots.flatten(0, 1)), edges, weight.flatten(), gate, edges[0], key=key, return_before=True
        )
        near = before.view(-1, self.k, self.channels)
        heard, alpha = self.read((near, x), edge_weight=weight, return_attention_weights=True)
        return heard, after.view(slots.shape), alpha, gate

    def _step_by_step(
        self,
        slots: Tensor,
        x: Tensor,
        sequence: Tensor,
        slot: Tensor,
        weight: Tensor,
        may: Tensor,
        key: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_side_by_side`, with gates that see what was read."""
        if not len(x):
            return x, slots, weight.new_zeros(0, self.heads, self.k), x.new_zeros(0)
        terms = (t.to(slots.dtype) for t in self.write.terms(x, key))
        parts = [to_dense_batch(t, sequence, batch_size=len(slots)) for t in (x, slot, weight, may, *terms)]
        x, slot, weight, may, erase, update = (part for part, _ in parts)  # [B, T, ...]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(x.size(1)):
            place = slot[:, t].unsqueeze(-1).expand(-1, -1, self.channels)
            near = slots.gather(1, place)  # [B, k, D]
            heard, alpha = self.read((near, x[:, t]), None, weight[:, t], True)
            seen = torch.cat([heard, x[:, t]], dim=1)
            gate = self.lin_gate(seen).sigmoid() * may[:, t].unsqueeze(1)  # [B, 1]
            strength = (weight[:, t] * gate).unsqueeze(-1).to(slots.dtype)
            # Added, not set: an absent edge may meet a present one in its slot.
            change = update[:, t].unsqueeze(1) - erase[:, t].unsqueeze(1) * near
            slots = slots.scatter_add(1, place, strength * change)
            found.append((heard, alpha, gate))
        there = parts[0][1]
        heard, alpha, gate = (torch.stack(series, dim=1)[there] for series in zip(*found, strict=True))
        return heard, slots, alpha, gate.squeeze(1)

    def _start(
        self, state: MemoryState | None, batch: Tensor, batch_size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Contents and steps before the first token."""
        if state is not None:
            size = len(state.slots) if batch_size is None else batch_size
            shape = (size, self.num_slots, self.channels)
            if state.slots.shape != shape or state.steps.shape != (size,):
                raise ConfigError("of another size", "state", list(shape), tuple(state.slots.shape))
            return state
        if batch_size is None:
            batch_size = int(batch.max()) + 1 if batch.numel() else 0
        return self.bank(batch_size), torch.zeros(batch_size, dtype=torch.long, device=batch.device)

    def _check(self, x: Tensor, batch: Tensor | None, others: dict[str, Tensor | None]) -> None:
        expected = f"[B, T, {self.channels}]" if batch is None else f"[N, {self.channels}] with batch [N]"
        if x.dim() != (3 if batch is None else 2) or x.size(-1) != self.channels:
            raise ConfigError("not sequences of tokens", "x", expected, tuple(x.shape))
        if batch is not None and batch.shape != x.shape[:1]:
            raise ConfigError("of another size", "batch", [x.size(0)], tuple(batch.shape))
        if (others["key"] is None) != (self.lin_write_key is None and not self.by_key):
            expected = "a key as large as x" if others["key"] is None else "none without binding"
            got = None if others["key"] is None else "one"
            raise ConfigError("key does not fit the memory", "key", expected, got)
        for name, value in others.items():
            shape = x.shape if name == "key" else x.shape[:-1]
            if value is not None and value.shape != shape:
                raise ConfigError("of another size", name, list(shape), tuple(value.shape))

    def extra_repr(self) -> str:
        gate = ", read_dependent_gate=True" if self.read_dependent_gate else ""
        binding = ", binding=True" if self.lin_write_key is not None else ""
        return f"{self.channels}, num_slots={self.num_slots}, k={self.k}{binding}{gate}"
