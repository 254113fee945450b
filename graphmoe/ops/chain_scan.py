"""What happens to the nodes of a graph one event after another, side by side for all nodes."""

import torch
from torch import Tensor

from graphmoe.errors import GraphError


def chain_scan(
    decay: Tensor, update: Tensor, start: Tensor, chain: Tensor, time: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Apply events to the states of their chains in order,

    .. math::
        V_c \leftarrow d_m \odot V_c + u_m, \qquad c = \mathrm{chain}(m).

    The first events of all chains are applied at once, then the second ones, and so on: as many passes as the
    longest chain has events. Differentiable once.

    Args:
        decay: ``d``, ``[M, F]``.
        update: ``u``, ``[M, F]``.
        start: States before the first event, ``[chains, F]``.
        chain: Chain of each event, ``[M]`` int64 in ``[0, chains)``.
        time: When each event happens, ``[M]``; events of one chain at equal times happen in the order given,
            as all do without it.

    Returns:
        The state of its chain just before each event, ``[M, F]``, and all states after the last,
        ``[chains, F]``, in the dtype of ``start``.

    Raises:
        GraphError: Events of different numbers or channels.
    """
    events, channels = chain.numel(), start.size(-1)
    for name, value in (("decay", decay), ("update", update)):
        if value.shape != (events, channels):
            got = tuple(value.shape)
            raise GraphError("not one row for each event", name, f"[{events}, {channels}]", got)
    decay, update = decay.to(start.dtype), update.to(start.dtype)
    return _scan(decay, update, start, chain, None if time is None else time.sort(stable=True).indices)


def ranks(chain: Tensor, chains: int) -> Tensor:
    """How many events of its chain come before each event of ``chain [M]``, ``[M]``."""
    ordered, perm = chain.sort(stable=True)
    counts = torch.bincount(chain, minlength=chains)
    place = torch.arange(chain.numel(), device=chain.device)
    within = place - (counts.cumsum(0) - counts).index_select(0, ordered)
    return torch.empty_like(place).scatter_(0, perm, within)


def _levels(chain: Tensor, chains: int, when: Tensor | None) -> tuple[Tensor, Tensor, list[int]]:
    """Lay events out level by level, chains by length, so that level ``r``, the ``r``-th events, is one slice
    and belongs to the first of the chains. ``when [M]``: the events in order of time.

    Returns:
        Events in this order ``[M]``, chains in descending length ``[chains]``, events of each level.
    """
    chain = chain if when is None else chain.index_select(0, when)
    counts = torch.bincount(chain, minlength=chains)
    by_length = counts.sort(descending=True, stable=True).indices
    position = torch.empty_like(by_length)
    position[by_length] = torch.arange(chains, device=chain.device)
    order = (ranks(chain, chains) * chains + position.index_select(0, chain)).argsort()
    shorter = torch.bincount(counts).cumsum(0)[:-1]  # chains of at most r events
    order = order if when is None else when.index_select(0, order)
    return order, by_length, (chains - shorter).tolist()


@torch.library.custom_op("graphmoe::chain_scan", mutates_args=())
def _scan(
    decay: Tensor, update: Tensor, start: Tensor, chain: Tensor, when: Tensor | None
) -> tuple[Tensor, Tensor]:
    order, by_length, levels = _levels(chain, start.size(0), when)
    decay, update = decay.index_select(0, order), update.index_select(0, order)
    state, seen = start.index_select(0, by_length), torch.empty_like(update)
    end = 0
    for size in levels:
        level, end = slice(end, end + size), end + size
        seen[level] = state[:size]
        state[:size].mul_(decay[level]).add_(update[level])
    before = torch.empty_like(seen).index_copy_(0, order, seen)
    return before, torch.empty_like(state).index_copy_(0, by_length, state)


@_scan.register_fake
def _(
    decay: Tensor, update: Tensor, start: Tensor, chain: Tensor, when: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(update), torch.empty_like(start)


@torch.library.custom_op("graphmoe::chain_scan_back", mutates_args=())
def _scan_back(
    grad_before: Tensor, grad_last: Tensor, decay: Tensor, before: Tensor, chain: Tensor, when: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    order, by_length, levels = _levels(chain, grad_last.size(0), when)
    heard, decay, before = (t.index_select(0, order) for t in (grad_before, decay, before))
    state = grad_last.index_select(0, by_length)
    grad_update = torch.empty_like(before)
    end = before.size(0)
    for size in reversed(levels):
        level, end = slice(end - size, end), end - size
        now = state[:size]
        grad_update[level] = now
        before[level].mul_(now)  # the gradient of the decay, in its place
        now.mul_(decay[level]).add_(heard[level])
    grad_decay = torch.empty_like(before).index_copy_(0, order, before)
    grad_update = torch.empty_like(before).index_copy_(0, order, grad_update)
    return grad_decay, grad_update, torch.empty_like(state).index_copy_(0, by_length, state)


@_scan_back.register_fake
def _(
    grad_before: Tensor, grad_last: Tensor, decay: Tensor, before: Tensor, chain: Tensor, when: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(decay), torch.empty_like(decay), torch.empty_like(grad_last)


def _setup(ctx, inputs, output) -> None:
    decay, _, _, chain, when = inputs
    ctx.save_for_backward(decay, output[0], chain, when)


def _backward(ctx, grad_before: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    return *_scan_back(grad_before.contiguous(), grad_last.contiguous(), *ctx.saved_tensors), None, None


_scan.register_autograd(_backward, setup_context=_setup)
