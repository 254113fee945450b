"""Balancing without a loss: what moves the buffers of routers after each step, and how even batches can
be."""

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe.loss import wanted
from graphmoe.metrics import max_violation, serving
from graphmoe.nn import ThresholdRouter, TopKRouter, moe_layers
from graphmoe.train.collaboration import BATCH_TOKENS
from graphmoe.train.evaluate import evaluating, pick_inputs
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.ranks import sum_of_ranks
from graphmoe.typing import NEVER, Record


class RouterBalance(Callback):
    """Moves the bias of every :class:`~graphmoe.nn.TopKRouter` that has one, and the thresholds of every
    :class:`~graphmoe.nn.ThresholdRouter`, by what all processes routed in the last micro-batch of a step.

    Edges count as the router gave them, whether or not a capacity limit dropped some; padding does not count.

    Args:
        model: Its MoE layers are the ones whose records the outputs of a step carry, in the same order.
    """

    def __init__(self, model: nn.Module):
        self.routers = [layer.router for layer in moe_layers(model)]
        self.biased = [
            i for i, r in enumerate(self.routers) if isinstance(r, TopKRouter) and r.bias_steps is not None
        ]
        self.thresholds = [i for i, r in enumerate(self.routers) if isinstance(r, ThresholdRouter)]

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if self.biased:
            records = [outputs.records[i] for i in self.biased]
            counts = {"wanted": torch.stack([wanted(record) for record in records])}  # [layers, E]
            counts = sum_of_ranks(state.accelerator, counts)["wanted"].long()
            for index, record, count in zip(self.biased, records, counts, strict=True):
                live = (record.routing.logits > NEVER / 2).any(dim=0)
                self.routers[index].rebalance(count, live)
        for index in self.thresholds:
            self.routers[index].observe(_all_scores(state, outputs.records[index]))


def _all_scores(state: TrainState, record: Record) -> Tensor:
    """Scores of the tokens of all ranks that are no padding, ``[N, E]``."""
    logits = record.routing.logits.detach()
    mask = torch.ones(logits.size(0), dtype=torch.bool, device=logits.device)
    mask = mask if record.mask is None else record.mask
    if state.accelerator.num_processes > 1:
        # Ranks may hold sequences of different lengths; what fills them up is marked as padding is.
        marked = torch.cat([logits, mask.unsqueeze(1).to(logits.dtype)], dim=1)
        marked = state.accelerator.gather(state.accelerator.pad_across_processes(marked))
        logits, mask = marked[:, :-1], marked[:, -1] > 0
    return logits[mask]


@torch.no_grad()
def probe_balance(
    model: nn.Module,
    windows: np.ndarray,
    *,
    batch_size: int,
    max_tokens: int = 32_768,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How uneven the load of a batch of text is, and how uneven it would be if it were even in the long run.

    - ``final_batch_violation [L]``: MaxVio of a batch of ``batch_size`` windows, mean over batches drawn with
      replacement.
    - ``final_batch_violation_even [L]``: the same if each expert's loads were scaled such that all experts
      serve equally many edges of all windows together. It is what no balancing that looks at one token at a
      time can take away, as the tokens of a text resemble one another; tokens without any likeness give
      :func:`~graphmoe.metrics.random_max_violation`.

    Args:
        model: A language model of this library; nothing in it changes.
        windows: Token ids ``[n, T + 1]``, of which every token but the last of a window is read.
        batch_size: Windows of a batch, as in training.
        max_tokens: Tokens read: as many windows, evenly spread over those given, as fit (at least one).
        samples: Batches drawn.
        seed: Of the draws, which do not touch torch's own generator.

    Returns:
        The figures above on the CPU in float32; none for a model without MoE layers.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    ids = pick_inputs(windows, max_tokens).to(next(model.parameters()).device)
    parts = []
    with evaluating(model):
        for part in ids.split(max(1, BATCH_TOKENS // ids.size(1))):
            records = model(input_ids=part, output_records=True, use_cache=False, logits_to_keep=1).records
            served = [serving(record.routing).view(*part.shape, -1).sum(dim=1) for record in records]
            parts.append(torch.stack(served).cpu().double())
    loads = torch.cat(parts, dim=1)  # [L, n, E]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ids), (samples, batch_size), generator=generator)
    batches = torch.stack([loads[:, rows].sum(dim=1) for rows in drawn], dim=1)  # [L, samples, E]
    total = loads.sum(dim=1, keepdim=True)  # an expert that serves nobody stays at 0
    even = batches / torch.where(total > 0, total, 1)
    live = total.squeeze(1) > 0
    figures = {}
    for name, values in (("batch_violation", batches), ("batch_violation_even", even)):
        rows = [
            torch.stack([max_violation(load, alive) for load in layer]).mean()
            for layer, alive in zip(values, live, strict=True)
        ]
        figures[f"final_{name}"] = torch.stack(rows).float()
    return figures
