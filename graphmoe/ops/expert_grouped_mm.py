"""Expert MLPs as grouped matrix products whose offsets stay on the device: no host sync."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.ops.expert_loop import activate, activate_back


def suits_grouped_mm(x: Tensor, down: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``x [*, D]`` as ``dtype`` and ``down [E, D_out, F]`` meet the kernel's demands."""
    if x.device.type != "cuda" or dtype != torch.bfloat16 or x.size(0) == 0:
        return False
    aligned = all(size % 8 == 0 for size in (x.size(1), *down.shape[1:]))  # 16 bytes
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def apply_grouped(
    rows: Tensor, gate_up: Tensor, down: Tensor, ptr: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`~graphmoe.ops.expert_loop.apply_loop`."""
    ends = ptr[1:].to(torch.int32)
    hidden = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    active = hidden.new_empty(rows.size(0), down.size(2))
    activate(activation, hidden.split(down.size(2), dim=1), active)
    out = F.grouped_mm(active, down.transpose(1, 2), offs=ends)
    out.masked_fill_(_absent(ptr, rows), 0)
    return out, hidden if keep else hidden.new_empty(0)


def back_grouped(
    grad: Tensor,
    scaled: Tensor,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ptr: Tensor,
    hidden: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`~graphmoe.ops.expert_loop.back_loop`."""
    ends, width = ptr[1:].to(torch.int32), down.size(2)
    grad_active = F.grouped_mm(grad, down, offs=ends)
    active, spare = torch.empty_like(grad_active), torch.empty_like(grad_active)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = rows.new_empty(rows.size(0), dtype=torch.float32)
    pre, grad_pre = hidden.split(width, dim=1), grad_hidden.split(width, dim=1)
    activate_back(activation, pre, grad_active, active, spare, grad_pre, grad_weight)
    grad_rows = F.grouped_mm(grad_hidden, gate_up, offs=ends)
    grad_gate_up = F.grouped_mm(grad_hidden.t(), rows, offs=ends)
    grad_down = F.grouped_mm(scaled.t(), active, offs=ends)
    # The kernel leaves rows behind the last offset unwritten, and on some devices empty experts too.
    absent, unused = _absent(ptr, rows), (ptr[1:] == ptr[:-1]).view(-1, 1, 1)
    grad_rows.masked_fill_(absent, 0)
    grad_weight.masked_fill_(absent.squeeze(1), 0)
    grad_gate_up.masked_fill_(unused, 0)
    grad_down.masked_fill_(unused, 0)
    return grad_rows, grad_gate_up, grad_down, grad_weight


def _absent(ptr: Tensor, rows: Tensor) -> Tensor:
    return (torch.arange(rows.size(0), device=rows.device) >= ptr[-1]).unsqueeze(1)
