"""A differentiable neural computer, forward and backward, against pytorch-dnc and plain vectorised torch.

pytorch-dnc (``pip install dnc``) is left out, and said to be, where it is not installed. The plain form is
the equations of the paper in tensors of all slots, under torch's autograd; its outputs are compared with ours
before times are taken. Beside wall time stands the time of the process' CPUs, which others on the machine
disturb less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import side_by_side
from graphmoe.nn import DNCCell
from graphmoe.nn.memory import SlotState
from graphmoe.nn.memory.dnc_memory import memory_step, parse_interface

OURS, STEPS, PLAIN, PEER = "DNCCell", "DNCCell, step by step", "plain vectorised", "pytorch-dnc"
AIM = "at least 2.3"


@dataclass(frozen=True)
class Shape:
    """Slots, channels of a slot, read heads, steps, sequences."""

    slots: int
    width: int
    heads: int
    steps: int
    batch: int
    hidden: int = 64
    channels: int = 64

    def __str__(self) -> str:
        return f"N={self.slots} W={self.width} R={self.heads} T={self.steps} batch {self.batch}"


SHAPES = (Shape(64, 32, 4, 40, 16), Shape(32, 16, 1, 24, 16))


class Plain(nn.Module):
    """The same computer with the equations one by one."""

    def __init__(self, cell: DNCCell, slots: int):
        super().__init__()
        self.cell, self.slots = cell, slots

    def forward(self, x: Tensor) -> Tensor:
        cell, state = self.cell, self.cell.initial_state(x.size(0), self.slots)
        slots, (reads, hidden, memory) = SlotState(*state[:6]), state[6:]
        outputs = []
        for given in cell.lin_input(x).unbind(dim=1):
            gates = given + cell.lin_state(torch.cat((reads, hidden), dim=1))
            enter, forget, leave, new = gates.chunk(4, dim=1)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(memory)
            told = parse_interface(cell.lin_interface(hidden), cell.memory.heads, cell.memory.width)
            slots, reads = memory_step(slots, told)
            reads = reads.flatten(1)
            outputs.append(torch.cat((reads, hidden), dim=1))
        return torch.stack(outputs, dim=1)


def peer(shape: Shape) -> Callable[[Tensor], Tensor] | None:
    """pytorch-dnc at the same sizes, or ``None`` where it is not installed."""
    try:
        from dnc import DNC
    except ImportError:
        return None
    net = DNC(
        input_size=shape.channels, hidden_size=shape.hidden, rnn_type="lstm", num_layers=1, batch_first=True,
        nr_cells=shape.slots, cell_size=shape.width, read_heads=shape.heads, gpu_id=-1,
    )  # fmt: skip
    return lambda x: net(x, (None, None, None), reset_experience=True)[0]


def step(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """One forward and one backward pass; gradients add up, as they do over micro-batches."""
    return lambda: call(x).square().mean().backward()


def cpu_ms(work: Callable[[], None], rounds: int) -> float:
    """Milliseconds of CPU time of one call."""
    began = time.process_time()
    for _ in range(rounds):
        work()
    return 1e3 * (time.process_time() - began) / rounds


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every form at one shape."""
    torch.manual_seed(0)
    cell = DNCCell(shape.channels, shape.hidden, shape.heads, shape.width)
    x = torch.randn(shape.batch, shape.steps, shape.channels)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda x: cell(x, num_slots=shape.slots)[0],
        STEPS: lambda x: cell(x, num_slots=shape.slots, return_states=True)[0],
        PLAIN: Plain(cell, shape.slots),
    }
    with torch.no_grad():
        difference = (forms[OURS](x) - forms[PLAIN](x)).abs().max().item()
    other = peer(shape)
    if other is not None:
        forms[PEER] = other
    work = {name: step(form, x) for name, form in forms.items()}
    wall = side_by_side(work, rounds=rounds)
    cpu = {name: cpu_ms(call, rounds) for name, call in work.items()}
    return {"shape": str(shape), "ms": wall, "cpu_ms": cpu, "difference": difference}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure both shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        wall, cpu = result["ms"], result["cpu_ms"]
        print(f"\nDNC, forward + backward, {shape}")
        print(f"{'':24} {'ms':>8} {'/ ours':>8} {'CPU ms':>8} {'/ ours':>8}")
        for name, value in sorted(wall.items(), key=lambda item: item[1]):
            ratios = value / wall[OURS], cpu[name] / cpu[OURS]
            print(f"{name:24} {value:8.1f} {ratios[0]:7.2f}x {cpu[name]:8.1f} {ratios[1]:7.2f}x")
        if PEER in wall:
            print(f"{PEER} / {OURS}: {wall[PEER] / wall[OURS]:.2f} (aim: {AIM})")
        else:
            print(f"{PEER}: not installed (pip install dnc), left out (aim: {AIM})")
        print(f"outputs of {OURS} and {PLAIN}: at most {result['difference']:.1e} apart")
        results.append(result)
    return results
