"""Scoring a classifier of sequences, and what its routers did with the same texts."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import DataError
from graphmoe.metrics import RouterCounts, count_routes, router_metrics
from graphmoe.nn import ExpertChoiceRouter, ThresholdRouter, moe_layers
from graphmoe.train.evaluate import evaluating

Texts = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Batches of token ids ``[n, T]``, mask ``[n, T]`` and labels ``[n]``."""


def score_texts(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Mean cross-entropy in nats, ``loss``, and share of the right answers, ``accuracy``.

    Arguments as :func:`answers`.
    """
    loss, right, _ = answers(model, texts)
    return {"loss": loss.mean().item(), "accuracy": right.double().mean().item()}


@torch.no_grad()
def answers(model: nn.Module, texts: Texts) -> tuple[Tensor, Tensor, list[RouterCounts]]:
    """Score every text, in eval mode, and count what was routed.

    Args:
        model: Takes ``input_ids``, ``attention_mask`` and ``output_records`` and returns ``logits``.
        texts: What to score.

    Returns:
        Cross-entropy ``[n]`` float64 and whether the answer is right ``[n]`` bool, in the order of the texts,
        and the counts of each MoE layer over all texts; all on the CPU.

    Raises:
        DataError: No text.
    """
    device = next(model.parameters()).device
    losses, right, counts = [], [], []
    with evaluating(model):
        for ids, mask, labels in texts:
            ids, mask, labels = (torch.from_numpy(part).to(device) for part in (ids, mask, labels))
            outputs = model(input_ids=ids, attention_mask=mask, output_records=True)
            losses.append(F.cross_entropy(outputs.logits.double(), labels, reduction="none").cpu())
            right.append((outputs.logits.argmax(dim=1) == labels).cpu())
            counts.append([count_routes(r.routing, r.mask, r.overflow) for r in outputs.records])
    if not losses:
        raise DataError("nothing to score", "texts", "at least one")
    summed = [
        RouterCounts(*(torch.stack(parts).sum(dim=0).cpu() for parts in zip(*layer, strict=True)))
        for layer in zip(*counts, strict=True)
    ]
    return torch.cat(losses), torch.cat(right), summed


def routing_summary(model: nn.Module, counts: list[RouterCounts]) -> dict[str, list[float]]:
    """How the routers spread the tokens of all texts, one number a layer, for JSON.

    Beside the figures of :func:`~graphmoe.metrics.router_metrics`, where tokens may be left out,
    ``unserved_random``: the share of tokens that nobody would choose if experts of the same loads chose
    blindly, :math:`\\prod_e (1 - \\mathrm{edges}_e / N)`.

    Args:
        model: Its MoE layers are those that were counted.
        counts: From :func:`answers`.
    """
    if not counts:
        return {}
    names = (
        "max_violation",
        "load_entropy",
        "dead_experts",
        "routing_entropy",
        "edges_per_token",
        "unserved",
    )
    rows = [router_metrics(count) for count in counts]
    figures = {name: [float(row[name]) for row in rows] for name in names}
    if all(isinstance(layer.router, ExpertChoiceRouter | ThresholdRouter) for layer in moe_layers(model)):
        shares = [count.served.double() / count.tokens.clamp(min=1) for count in counts]
        figures["unserved_random"] = [float((1 - share).prod()) for share in shares]
    return figures
