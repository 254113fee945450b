"""Expert MLPs as one matrix product per expert, on any device and dtype; reads ``ptr`` to the host.

The rows of several small experts form a *run*, and a large expert is cut into several: elementwise
work then has enough values for all threads and few enough for the cache, however uneven the load.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from graphmoe.errors import GraphError
from graphmoe.ops.memory import empty

HALVES = {"swiglu": 2, "gelu": 1}
"""Activations, and how many blocks of ``F`` rows the first projection of each has."""

RUN_VALUES = 1 << 20
"""Hidden values ``rows * F`` of one run."""

RUN_ROWS = 128
"""Rows a run may have at any ``F``, so that its products stay efficient."""

FEW_ROWS = 8
"""Rows up to which the time of a product on a CPU is that of reading its weights, as when one sequence is
decoded. A BLAS reads them about twice as fast as its left operand if there are more outputs than inputs."""

STRIP_VALUES = 1 << 17
"""Hidden values of one strip, per thread: elementwise work on a CPU goes strip by strip, so that what one
operation writes is still in the cache when the next one reads it."""

_aten = torch.ops.aten

Run = list[tuple[int, int, int]]
"""Consecutive pieces ``(expert, first row, end row)``."""


def apply_loop(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ptr: Tensor,
    activation: str,
    keep: bool,
    places: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows ``[R, D]`` to outputs ``[R, D_out]``, and with ``keep`` the hidden rows ``[R, halves * F]``.

    With ``places`` outputs and hidden rows have that many, and ``rows`` may end behind those present. Outputs
    of absent rows are 0; their hidden rows, which nobody reads, are not written.
    """
    count, width = rows.size(0) if places is None else places, down.size(2)
    offsets = read_offsets(ptr, count)
    runs = make_runs(offsets, width)
    longest = _longest(runs)
    hidden = empty(rows, count if keep else longest, gate_up.size(1))
    active = empty(rows, longest, width)
    out = empty(rows, count, down.size(1))
    out[offsets[-1] :].zero_()
    first, second = gate_up.transpose(1, 2).unbind(), down.transpose(1, 2).unbind()
    for run in runs:
        start, end = run[0][1], run[-1][2]
        pre = hidden[start:end] if keep else hidden[: end - start]
        for expert, low, high in run:
            _expand(rows[low:high], first[expert], pre[low - start : high - start])
        activate(activation, pre.split(width, dim=1), active[: end - start])
        for expert, low, high in run:
            torch.mm(active[low - start : high - start], second[expert], out=out[low:high])
    return out, hidden if keep else hidden.new_empty(0)


def back_loop(
    grad: Tensor,
    scaled: Tensor,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ptr: Tensor,
    hidden: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows, both projections and the routing weights.

    Args:
        grad: Gradient of the weighted rows, ``[R, D_out]``.
        scaled: ``grad`` times the routing weights.
        rows: Input rows times the routing weights, ``[R, D]``.
        gate_up, down, ptr, hidden, activation: As in and from :func:`apply_loop`.

    Returns:
        Gradients ``[R, D]`` (still without the routing weights), ``gate_up``, ``down``, ``[R]``.
    """
    count, width = rows.size(0), down.size(2)
    offsets = read_offsets(ptr, count)
    runs = make_runs(offsets, width)
    longest = _longest(runs)
    scratch, grad_hidden = empty(rows, 3, longest, width), empty(rows, longest, hidden.size(1))
    grad_gate_up, grad_down = empty(rows, *gate_up.shape), empty(rows, *down.shape)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            grad_gate_up[expert].zero_()
            grad_down[expert].zero_()
    grad_rows = empty(rows, *rows.shape)
    grad_weight = rows.new_empty(count, dtype=torch.promote_types(rows.dtype, torch.float32))
    grad_rows[offsets[-1] :].zero_()
    grad_weight[offsets[-1] :].zero_()
    first, second = gate_up.unbind(), down.unbind()
    grad_first, grad_second = grad_gate_up.unbind(), grad_down.unbind()
    for run in runs:
        start, end = run[0][1], run[-1][2]
        grad_active, active, spare = scratch[:, : end - start].unbind()
        grad_pre = grad_hidden[: end - start]
        for expert, low, high in run:
            torch.mm(grad[low:high], second[expert], out=grad_active[low - start : high - start])
        activate_back(
            activation,
            hidden[start:end].split(width, dim=1),
            grad_active,
            active,
            spare,
            grad_pre.split(width, dim=1),
            grad_weight[start:end],
        )
        for expert, low, high in run:
            here = slice(low - start, high - start)
            beta = int(low > offsets[expert])  # the pieces of a cut expert add up
            total = grad_second[expert]
            torch.addmm(total, scaled[low:high].t(), active[here], beta=beta, out=total)
            total = grad_first[expert]
            torch.addmm(total, grad_pre[here].t(), rows[low:high], beta=beta, out=total)
            torch.mm(grad_pre[here], first[expert], out=grad_rows[low:high])
    return grad_rows, grad_gate_up, grad_down, grad_weight


def _expand(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """``rows [r, D] @ weight [D, W]``, where ``weight`` is a transposed view and ``W > D``, to ``out``."""
    if rows.size(0) > FEW_ROWS or rows.device.type != "cpu":
        torch.mm(rows, weight, out=out)
    else:
        # A product of two vectors at least: with one, another kernel is taken, which reads more slowly.
        several = rows if rows.size(0) > 1 else rows.repeat(2, 1)
        out.copy_(torch.mm(weight.t(), several.t()).t()[: rows.size(0)])


def activate(activation: str, pre: tuple[Tensor, ...], out: Tensor) -> None:
    """Write the activation of the hidden values ``pre``, one ``[*, F]`` a half, to ``out``."""
    for strip in _strips(out):
        if activation == "swiglu":
            _aten.silu.out(pre[0][strip], out=out[strip]).mul_(pre[1][strip])
        else:
            _aten.gelu.out(pre[0][strip], out=out[strip])


def activate_back(
    activation: str,
    pre: tuple[Tensor, ...],
    grad: Tensor,
    out: Tensor,
    spare: Tensor,
    grad_pre: tuple[Tensor, ...],
    dot: Tensor | None,
) -> None:
    """Gradient of :func:`activate` to ``grad_pre``, its value to ``out``, ``sum(value * grad)`` to ``dot`` if
    there is one.

    ``grad`` and ``spare`` are used up. One exponential serves the gate, its derivative and the value:
    with s = sigmoid(g), a = g s u and t = grad u, the gradient of g is t (s + g s (1 - s)), which is the
    interpolation of ``a grad`` and ``t`` at ``s``, and ``a grad`` is what ``dot`` sums.
    """
    for strip in _strips(out):
        _strip_back(
            activation,
            [half[strip] for half in pre],
            grad[strip],
            out[strip],
            spare[strip],
            [half[strip] for half in grad_pre],
            None if dot is None else dot[strip],
        )


def _strip_back(
    activation: str,
    pre: Sequence[Tensor],
    grad: Tensor,
    out: Tensor,
    spare: Tensor,
    grad_pre: Sequence[Tensor],
    dot: Tensor | None,
) -> None:
    if activation == "swiglu":
        (gate, up), (grad_gate, grad_up) = pre, grad_pre
        torch.sigmoid(gate, out=spare)
        torch.mul(gate, spare, out=out)
        torch.mul(out, grad, out=grad_up)
        torch.mul(out.mul_(up), grad, out=grad_gate)
        if dot is not None:
            torch.sum(grad_gate, 1, dtype=dot.dtype, out=dot)
        grad_gate.lerp_(grad.mul_(up), spare)
    else:
        _aten.gelu.out(pre[0], out=out)
        if dot is not None:
            torch.mul(out, grad, out=spare)
            torch.sum(spare, 1, dtype=dot.dtype, out=dot)
        _aten.gelu_backward.grad_input(grad, pre[0], grad_input=grad_pre[0])


def _strips(hidden: Tensor) -> Iterator[slice]:
    """Consecutive rows of ``hidden [*, F]``; a GPU takes them all at once."""
    rows = hidden.size(0)
    step = max(rows, 1)
    if hidden.device.type == "cpu":
        step = max(1, STRIP_VALUES * torch.get_num_threads() // max(hidden.size(1), 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def read_offsets(ptr: Tensor, count: int) -> list[int]:
    offsets = ptr.tolist()
    if offsets[0] != 0 or offsets[-1] > count or any(low > high for low, high in pairwise(offsets)):
        raise GraphError("offsets do not ascend within the rows", "ptr", f"0 <= ... <= {count}", offsets)
    return offsets


def make_runs(offsets: list[int], width: int) -> list[Run]:
    limit = max(RUN_ROWS, RUN_VALUES // width)
    runs: list[Run] = []
    for expert, (start, end) in enumerate(pairwise(offsets)):
        pieces = -(-(end - start) // limit)
        for piece in range(pieces):
            low = start + (end - start) * piece // pieces
            high = start + (end - start) * (piece + 1) // pieces
            if not runs or high - runs[-1][0][1] > limit:
                runs.append([])
            runs[-1].append((expert, low, high))
    return runs


def _longest(runs: list[Run]) -> int:
    return max((run[-1][2] - run[0][1] for run in runs), default=0)
