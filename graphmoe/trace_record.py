"""A traced pass as a plain record: what its pictures are made from, each figure beside its chance level."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from graphmoe.checkpoint import RunRecord
from graphmoe.errors import GraphError
from graphmoe.metrics import random_coactivation, random_max_violation
from graphmoe.tracing import coactivation
from graphmoe.typing import EXPERT, ROUTES, TOKEN

MOST_GRAPHS = 12
"""Layers whose pairs of experts are compared with chance, evenly spaced: many experts take seconds each."""


def trace_record(
    data: HeteroData,
    labels: Sequence[str] | None = None,
    *,
    path: str | Path = "trace",
    config: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Summarise a traced pass as arrays, for :class:`analysis.report.Report`.

    Padding is left out: here ``N`` counts the tokens that are present. ``L`` are the MoE layers, ``E`` the
    most experts that one of them has and ``P`` the layers compared pair by pair.

    ==============================  =========  ==========================================================
    ``routed_layer``                [L]        number of the decoder layer
    ``routed_sequence``             [N]        sequence of the token
    ``routed_degree``               [N, L]     experts that serve the token
    ``routed_first``                [N, L]     of them the one of the largest weight; -1 without any
    ``routed_first_weight``         [N, L]     its weight over the sum of the token's; NaN without any
    ``routed_entropy``              [N, L]     entropy of the token's weights, bits; NaN without any
    ``routed_load``                 [L, E]     edges of the expert; NaN if it is dormant or not there
    ``routed_max_violation_random`` [L]        MaxVio to expect if tokens chose blindly
    ``routed_dead_random``          [L]        experts without an edge to expect if tokens chose blindly
    ``routed_graph_layer``          [P]        place of the compared layer among the L
    ``routed_coactivation``         [P, E, E]  share of tokens that both serve; NaN as for the load
    ``routed_coactivation_random``  [P, E, E]  that share if experts were chosen independently
    ==============================  =========  ==========================================================

    Args:
        data: What :func:`graphmoe.trace` returned.
        labels: Text of every token, ``B * T`` of them. Default: their ids, or else their positions.
        path: What the record is named after.
        config: Settings of the model.
        result: Facts about it, as in ``result.json``.

    Raises:
        GraphError: ``data`` is no traced pass, all of it is padding, or there is not one label a token.
    """
    shares, total = coactivation(data), data[TOKEN].num_nodes
    kept = _attribute(data, "present", torch.ones(total, dtype=torch.bool)).nonzero().flatten()
    if not kept.numel():
        raise GraphError("every token is padding", "attention_mask", "at least one token")
    if labels is None:
        labels = [str(number) for number in _attribute(data, "input_ids", torch.arange(total)).tolist()]
    if len(labels) != total:
        raise GraphError("not one label a token", "labels", total, len(labels))
    layers = list(shares)
    choices = [_choices(data, layer, kept) for layer in layers]
    loads = [_load(data, layer, kept) for layer in layers]
    experts = max(load.size(0) for load, _, _ in loads)
    compared = np.linspace(0, len(layers) - 1, min(len(layers), MOST_GRAPHS)).round().astype(np.int64)
    pairs = [shares[layers[place]] for place in compared]
    degree, first, weight, entropy = (
        torch.stack(column, dim=1).numpy() for column in zip(*choices, strict=True)
    )
    records = {
        "routed_layer": np.array(layers, np.int64),
        "routed_sequence": _attribute(data, "batch", torch.zeros(total, dtype=torch.long))[kept].numpy(),
        "routed_degree": degree,
        "routed_first": first,
        "routed_first_weight": weight,
        "routed_entropy": entropy,
        "routed_load": np.stack([_widen(load, experts) for load, _, _ in loads]),
        "routed_max_violation_random": np.array([violation for _, violation, _ in loads]),
        "routed_dead_random": np.array([dead for _, _, dead in loads]),
        "routed_graph_layer": compared,
        "routed_coactivation": np.stack([_widen(pair, experts) for pair in pairs]),
        "routed_coactivation_random": np.stack([_widen(_independent(pair), experts) for pair in pairs]),
    }
    meta = {"tokens": json.dumps([labels[token] for token in kept.tolist()])}
    return RunRecord(Path(path), dict(config or {}), [], records, meta, dict(result or {}))


def _attribute(data: HeteroData, name: str, default: Tensor) -> Tensor:
    return data[TOKEN].get(name, default)


def _weights(data: HeteroData, layer: int, kept: Tensor) -> Tensor:
    """Routing weights of the tokens ``kept`` in one layer, ``[N, E]``; -inf where there is no edge."""
    routes, nodes = data[ROUTES], (data[EXPERT].layer == layer).nonzero().flatten()
    mine = routes.layer == layer
    token, expert = routes.edge_index[:, mine]
    weights = torch.full((data[TOKEN].num_nodes, nodes.numel()), -torch.inf)
    weights[token, torch.searchsorted(nodes, expert)] = routes.weight[mine]
    return weights[kept]


def _choices(data: HeteroData, layer: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Degree, first expert, its share of the weights and their entropy, each ``[N]``."""
    weights = _weights(data, layer, kept)
    degree = (weights > -torch.inf).sum(dim=1)
    part = weights.clamp(min=0)
    part = part / part.sum(dim=1, keepdim=True)  # 0 / 0 is NaN: nothing to divide
    entropy = -torch.xlogy(part, part).sum(dim=1) / math.log(2)
    return degree, torch.where(degree > 0, weights.argmax(dim=1), -1), part.amax(dim=1), entropy


def _load(data: HeteroData, layer: int, kept: Tensor) -> tuple[Tensor, float, float]:
    """Edges of each expert ``[E]``, and the MaxVio and the idle experts of a blind choice."""
    edges = _weights(data, layer, kept) > -torch.inf
    load, degree = edges.sum(dim=0).double(), edges.sum(dim=1).double()
    nodes = data[EXPERT].layer == layer
    awake = data[EXPERT].level[nodes] > 0 if "level" in data[EXPERT] else torch.ones_like(load) > 0
    live, busy = int(awake.sum()), int((degree > 0).sum())
    if not busy:
        return load.where(awake, torch.nan), 0.0, float(live)
    k = min(max(round(degree.sum().item() / busy), 1), live)
    dead = live * float((1 - degree.clamp(max=live) / live).prod())
    return load.where(awake, torch.nan), random_max_violation(busy, live, k), dead


def _independent(share: Tensor) -> Tensor:
    """What :func:`~graphmoe.tracing.coactivation` is where experts are chosen independently, ``[E, E]``."""
    load = share.diagonal()
    k = load.sum().item()
    return random_coactivation(load, fixed=abs(k - round(k)) < 1e-6)


def _widen(values: Tensor, experts: int) -> np.ndarray:
    """Fill up every axis of ``values`` with NaN to ``experts``: layers may differ in their number."""
    wide = np.full((experts,) * values.dim(), np.nan)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide
