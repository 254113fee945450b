"""What the memories of a trained language model do with a text."""

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe.loss import load
from graphmoe.metrics import max_violation
from graphmoe.nn.budget import in_token_order
from graphmoe.train.evaluate import evaluating, pick_inputs
from graphmoe.typing import MemoryRecord

NOT_ASKED = -100
"""Answer of a token that nobody asked anything."""


@torch.no_grad()
def probe_memory(model: nn.Module, windows: np.ndarray, *, max_tokens: int = 4096) -> dict[str, Tensor]:
    """How evenly slots are used, and what tokens wrote and read.

    - ``final_memory_load [L, S]``: share of the edges of each memory.
    - ``final_memory_gate [L]``: how much a token writes, mean over tokens.
    - ``final_memory_write [T, S]`` and ``final_memory_read [T, S]``: what the first memory did in the first
      window, see :func:`slot_map`, beside its ``final_memory_tokens [T]`` and ``final_memory_answers [T]``,
      -100 for a token that nobody asked to recall anything.

    Args:
        model: A language model of this library; nothing in it changes.
        windows: Token ids ``[n, T + 1]``, of which every token but the last of a window is read.
        max_tokens: Tokens read: as many windows, evenly spread over those given, as fit (at least one).

    Returns:
        The figures above on the CPU; none for a model without memory.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1.
    """
    if not model.config.num_memory_slots:
        return {}
    ids = pick_inputs(windows, max_tokens).to(next(model.parameters()).device)
    with evaluating(model):
        out = model(input_ids=ids, output_records=True, use_cache=False, logits_to_keep=1)
    records = out.memory_records
    steps = ids.size(1)
    write, read = (values[:steps] for values in slot_map(records[0], model.config.num_memory_slots_per_tok))
    return {
        "final_memory_load": torch.stack([load(record.routing) for record in records]).float().cpu(),
        "final_memory_gate": torch.stack([record.gate.mean() for record in records]).float().cpu(),
        "final_memory_write": write.contiguous(),
        "final_memory_read": read.contiguous(),
        "final_memory_tokens": ids[0].cpu(),
        "final_memory_answers": torch.full_like(ids[0], NOT_ASKED).cpu(),
    }


def slot_map(record: MemoryRecord, k: int) -> tuple[Tensor, Tensor]:
    """What each token wrote into each slot, routing weight times gate, and how much it looked at it,
    attention as a mean over heads: each ``[N, S]``, float32 on the CPU.

    Args:
        record: What a memory did.
        k: Slots a token.
    """
    slot, weight = (value.cpu() for value in in_token_order(record.routing, k))
    size = (len(slot), record.routing.num_experts + 1)  # a place for absent edges behind the slots
    strength = weight.float() * record.gate.cpu().float().unsqueeze(1)
    attention = record.read.cpu().float().mean(dim=1)
    write, read = (torch.zeros(size).scatter_(1, slot, values) for values in (strength, attention))
    return write[:, :-1], read[:, :-1]


def memory_summary(probe: dict[str, Tensor]) -> dict[str, list[float]]:
    """The figures of :func:`probe_memory` as one number a layer, for JSON: ``max_violation`` of the load of
    slots, ``largest_load`` beside the ``even_load``, and the ``gate``."""
    shares = probe["final_memory_load"]
    return {
        "max_violation": [max_violation(share).item() for share in shares],
        "largest_load": shares.amax(dim=1).tolist(),
        "even_load": [1 / shares.size(1)] * len(shares),
        "gate": probe["final_memory_gate"].tolist(),
    }
