"""What a network that copies has learned: how much it recalls, and how its memory does it."""

import numpy as np
import torch
from torch import Tensor

from graphmoe.data.copy_task import IGNORE, CopyTask
from graphmoe.models import MocaForTokenPrediction
from graphmoe.train.memory import slot_map

BATCH = 64
"""Sequences scored at once."""


@torch.no_grad()
def recall(model: MocaForTokenPrediction, task: CopyTask, sequences: int) -> dict[str, Tensor]:
    """Score fresh sequences: ``length``, ``right`` and ``loss`` (a sum) of each ``[sequences]``; over all of
    their tokens the mean of ``kept`` edges and the ``slot_load [S]``, edges of each slot as a fraction."""
    model.eval()
    device = next(model.parameters()).device
    rows: dict[str, list[Tensor]] = {"length": [], "right": [], "loss": []}
    kept, tokens = 0.0, 0
    load = torch.zeros(model.config.num_slots)
    for index in range(-(-sequences // BATCH)):
        count = min(BATCH, sequences - index * BATCH)
        batch = {k: v.to(device) for k, v in task.batch(index, BATCH, slice(0, count)).items()}
        out = model(batch["input_ids"], batch["attention_mask"], output_records=True)
        counts = batch["labels"] != IGNORE
        losses = torch.nn.functional.cross_entropy(
            out.logits.float().transpose(1, 2), batch["labels"], ignore_index=IGNORE, reduction="none"
        )
        rows["length"].append(counts.sum(dim=1).cpu())
        rows["right"].append(((out.logits.argmax(dim=-1) == batch["labels"]) & counts).sum(dim=1).cpu())
        rows["loss"].append(losses.sum(dim=1).cpu())
        first = out.layer_records[0]
        if first.kept is not None:
            kept += float(first.kept.sum())
            tokens += len(first.kept)
        if first.memory is not None:
            load += first.memory.routing.ptr.diff().cpu()
    scores = {name: torch.cat(parts) for name, parts in rows.items()}
    scores["kept"] = torch.tensor(kept / tokens if tokens else 1.0)
    scores["slot_load"] = load / load.sum().clamp(min=1)
    return scores


def figures(scores: dict[str, Tensor]) -> dict[str, float]:
    """Recall accuracy over tokens, the fraction of sequences without a mistake, nats a token, edges kept."""
    total = int(scores["length"].sum())
    return {
        "recall_accuracy": int(scores["right"].sum()) / total,
        "exact_sequences": (scores["right"] == scores["length"]).double().mean().item(),
        "loss": float(scores["loss"].sum()) / total,
        "edges_kept": float(scores["kept"]),
    }


def by_length(scores: dict[str, Tensor], width: int = 10) -> dict[str, float]:
    """Recall accuracy of sequences of similar length, such as ``"10-19"``; the longest join those before."""
    length, right = scores["length"].numpy(), scores["right"].numpy()
    last = max(int(length.max()) - 1, int(length.min())) // width
    bucket = np.minimum(length // width, last)
    found = {}
    for number in np.unique(bucket):
        here = bucket == number
        low, high = length[here].min(), length[here].max()
        found[f"{low}-{high}"] = float(right[here].sum() / length[here].sum())
    return found


def least_distance(slots: Tensor) -> float | None:
    """Least distance between two of ``slots [S, F]``; ``None`` for a single one."""
    return float(torch.pdist(slots.detach().float()).min()) if len(slots) > 1 else None


@torch.no_grad()
def one_sequence(model: MocaForTokenPrediction, task: CopyTask) -> dict[str, Tensor]:
    """What the first memory did with the longest sequence of the task.

    Returns:
        ``write [T, S]``: weight times gate; ``read [T, S]``: attention, mean over heads; ``tokens [T]``,
        ``answers [T]`` (what was said at blanks, else -100), ``slots [S, F]``: contents in the end.
    """
    model.eval()
    longest = CopyTask(task.num_tokens, task.max_length, task.max_length, seed=task.seed, part="test")
    batch = longest.batch(0, 1, slice(0, 1))
    device = next(model.parameters()).device
    out = model(batch["input_ids"].to(device), output_records=True)
    record = out.layer_records[0].memory
    write, read = slot_map(record, model.config.num_slots_per_tok)
    labels = batch["labels"][0]
    answers = torch.where(labels == IGNORE, IGNORE, out.logits[0].argmax(dim=-1).cpu())
    return {
        "write": write.contiguous(),
        "read": read.contiguous(),
        "tokens": batch["input_ids"][0],
        "answers": answers,
        "slots": out.state.memory[0].slots[0].cpu(),
    }


def distinct_slots(write: Tensor, length: int) -> int:
    """How many slots are the first choice of one of the first ``length`` tokens, by ``write [T, S]``."""
    return len(set(write[:length].argmax(dim=1).tolist()))
