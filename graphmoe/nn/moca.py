from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.loss import effective_edges
from graphmoe.nn.budget import within_budget
from graphmoe.nn.expert import FeedForward
from graphmoe.nn.memory_layer import MemoryLayer
from graphmoe.nn.moe import MoELayer
from graphmoe.typing import MemoryState, MocaRecord, Routing


class MocaLayer(nn.Module):
    r"""Slots to remember with and experts to compute with, both routed, and a budget of edges for each token.

    .. math::
        h = x + \mathrm{Memory}(\mathrm{norm}(x)), \qquad y = h + \mathrm{Experts}(\mathrm{norm}(h))

    :class:`MemoryLayer` and :class:`MoELayer` have a router each, of one hidden layer of ``D / 2`` channels.
    With ``budget`` a head foretells which fraction of its edges a token uses,
    :math:`b_n = \sigma(W_2\,\mathrm{ReLU}(W_1 x_n))` with ``D / 4`` channels in between, and edges of both
    routers with :math:`b_n w < \phi` are left out; see :func:`~graphmoe.nn.budget.within_budget`, and
    :func:`~graphmoe.loss.budget` for the loss that trains both routers to need few.

    Edges: token -> slot, slot -> token, token -> expert, expert -> token.

    Args:
        channels: Channels ``D``.
        num_slots: ``S``; 0: no memory.
        num_experts: ``E``; 1: no experts, but a :class:`FeedForward` of the size of one.
        slots_per_token: Slots ``k`` a token.
        k: Experts a token.
        hidden_channels: Channels inside an expert. Default: ``2 * D``.
        heads: Attention heads of reading.
        binding, address, read_dependent_gate, temperature: Of the memory; the temperature is also that of the
            experts.
        budget: Whether tokens have a budget.
        edge_floor: :math:`\phi`, in [0, 1): which edges are left out; without a budget ``b`` is 1.

    Shapes:
        - **input:** as :class:`MemoryLayer`, without ``thin``; ``strength``: scalar by which the floor is
          multiplied.
        - **output:** as ``x``; :class:`~graphmoe.typing.MemoryState`, or ``None`` without a memory;
          :class:`~graphmoe.typing.MocaRecord`.

    Raises:
        ConfigError: A floor outside [0, 1), a negative number of slots, a state without a memory, or as
            :class:`MemoryLayer` and :class:`MoELayer`.
    """

    def __init__(
        self,
        channels: int,
        num_slots: int,
        num_experts: int,
        *,
        slots_per_token: int = 2,
        k: int = 2,
        hidden_channels: int | None = None,
        heads: int = 4,
        binding: bool = False,
        address: str = "token",
        read_dependent_gate: bool = False,
        temperature: float = 1.0,
        budget: bool = False,
        edge_floor: float = 0.0,
    ):
        super().__init__()
        if not 0 <= edge_floor < 1:
            raise ConfigError("no weight an edge may lie under", "edge_floor", ">= 0 and < 1", edge_floor)
        if num_slots < 0:
            raise ConfigError("negative number of slots", "num_slots", "at least 0", num_slots)
        self.edge_floor = edge_floor
        hidden_channels = 2 * channels if hidden_channels is None else hidden_channels
        self.memory, self.memory_norm = None, None
        if num_slots:
            self.memory_norm = nn.LayerNorm(channels)
            self.memory = MemoryLayer(
                channels, num_slots, slots_per_token, heads,
                binding=binding, address=address, read_dependent_gate=read_dependent_gate,
                temperature=temperature,
            )  # fmt: skip
        self.norm = nn.LayerNorm(channels)
        if num_experts == 1:
            self.experts = FeedForward(channels, hidden_channels, activation="gelu")
        else:
            router = {"temperature": temperature, "hidden_channels": channels // 2}
            self.experts = MoELayer(
                channels, num_experts, k,
                hidden_channels=hidden_channels, activation="gelu", router_kwargs=router,
            )  # fmt: skip
        self.budget = None
        if budget:
            width = max(channels // 4, 1)
            self.budget = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.memory_norm, self.memory, self.norm, self.experts):
            if module is not None:
                module.reset_parameters()
        if self.budget is not None:
            self.budget[0].reset_parameters()
            self.budget[2].reset_parameters()
            nn.init.constant_(self.budget[2].bias, 3.0)  # everything is allowed at first

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: MemoryState | None = None,
        *,
        key: Tensor | None = None,
        write: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        strength: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState | None, MocaRecord]:
        if self.memory is None and (state is not None or key is not None):
            raise ConfigError("there is no memory to go on with", "state", "None without slots", "a state")
        flat = None if mask is None else mask.flatten()
        budget = None
        if self.budget is not None:
            budget = self.budget(x).sigmoid().flatten().float()
        usage: list[Tensor] = []
        remembered = chosen = None
        if self.memory is not None:
            heard, state, remembered = self.memory(
                self.memory_norm(x), mask, state, key=key, write=write,
                thin=self._thin(budget, usage, strength), batch=batch, batch_size=batch_size,
            )  # fmt: skip
            x = x + heard
        if isinstance(self.experts, MoELayer):
            out, chosen = self.experts(
                self.norm(x), mask=mask, thin=self._thin(budget, usage, strength), return_record=True
            )
        else:
            out = self.experts(self.norm(x))
        kept = [share_kept(record.routing) for record in (remembered, chosen) if record is not None]
        return x + out, state, MocaRecord(
            remembered,
            chosen,
            torch.stack(usage).mean(dim=0) if usage else None,
            torch.stack(kept).mean(dim=0) if kept else None,
            budget,
            flat,
        )  # fmt: skip

    def _thin(
        self, budget: Tensor | None, usage: list[Tensor], strength: Tensor | None
    ) -> Callable[[Routing], Routing]:
        """What notes how much of a routing is used, and then leaves the rest out."""

        def thin(routing: Routing) -> Routing:
            usage.append(effective_edges(routing))
            if not self.edge_floor:
                return routing
            floor = self.edge_floor if strength is None else self.edge_floor * strength
            return within_budget(routing, floor, budget)

        return thin

    def extra_repr(self) -> str:
        return f"edge_floor={self.edge_floor}"


def share_kept(routing: Routing) -> Tensor:
    """Fraction of the places of each token that hold an edge, ``[N]``."""
    present = (routing.expert < routing.num_experts).to(routing.logits.dtype)
    count = torch.zeros_like(routing.logits[:, 0]).index_add(0, routing.token, present)
    return count / max(routing.k, 1)
