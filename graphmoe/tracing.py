"""A forward pass as the typed graph."""

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from graphmoe.errors import ConfigError
from graphmoe.graph import to_hetero
from graphmoe.nn import AttendConv, MoELayer, edge_form, moe_layers
from graphmoe.nn.rows import attention_of_experts
from graphmoe.typing import ATTENDS, COUPLES, EXPERT, ROUTES, TOKEN, Record


@torch.no_grad()
def trace(model: nn.Module, **inputs: Tensor) -> HeteroData:
    r"""Run ``model`` once, in eval mode and edge by edge, and return what passed between its nodes.

    Nodes: ``token`` (position ``b * T + t``) and ``expert`` (``layer * E + e``, attributes ``layer``,
    ``index`` and ``level``). Edges, each with ``weight`` and ``layer``: ``token attends token``
    (attention, mean over heads), ``token routes expert`` (routing weight) and ``expert couples
    expert``: the part of a coupling's strength that is the same for all tokens, or of collaborating experts
    the attention of one to another, mean over the tokens that have both, heads and rounds (mediators are no
    nodes of it).

    Args:
        model: A language model of this library.
        **inputs: What its forward takes, such as ``input_ids [B, T]``.

    Raises:
        ConfigError: The model has no MoE layer of this library.
    """
    layers = moe_layers(model)
    if not layers:
        raise ConfigError("nothing to trace", "model", "a model with MoELayers", type(model).__name__)
    attention: list[tuple[Tensor, Tensor]] = []
    hooks = []
    for conv in model.modules():
        if isinstance(conv, AttendConv):
            hooks.append(conv.register_propagate_forward_pre_hook(_keep_attention(attention)))
    training, tracked = model.training, [layer.track_attention for layer in layers]
    model.eval()
    for layer in layers:
        layer.track_attention = True
    try:
        with edge_form(model):
            records = model(**inputs, output_records=True, use_cache=False).records
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        for layer, before in zip(layers, tracked, strict=True):
            layer.track_attention = before
    return _assemble(layers, records, attention)


def _keep_attention(kept: list[tuple[Tensor, Tensor]]):
    def hook(conv: AttendConv, inputs: tuple) -> None:
        edge_index, _, arguments = inputs
        kept.append((edge_index.cpu(), arguments["alpha"].mean(dim=-1).cpu()))

    return hook


def _assemble(
    layers: list[MoELayer], records: tuple[Record, ...], attention: list[tuple[Tensor, Tensor]]
) -> HeteroData:
    num_tokens, num_experts = records[0].routing.logits.shape
    routes, couples = [], []
    for index, (layer, record) in enumerate(zip(layers, records, strict=True)):
        live = int(record.routing.ptr[-1])  # rows behind it are absent edges
        target = record.routing.expert[:live] + index * num_experts
        edges = torch.stack([record.routing.token[:live], target])
        routes.append((edges.cpu(), record.routing.weight[:live].float().cpu()))
        strength = _strength(layer, record)
        if strength is not None:
            to, source = (strength > 0).nonzero(as_tuple=True)
            edges = torch.stack([source, to]) + index * num_experts
            couples.append((edges.cpu(), strength[to, source].float().cpu()))
    edges, attributes = {}, {}
    for edge_type, passes in ((ATTENDS, attention), (ROUTES, routes), (COUPLES, couples)):
        if passes:
            edges[edge_type] = torch.cat([e for e, _ in passes], dim=1)
            attributes[edge_type] = {
                "weight": torch.cat([w for _, w in passes]),
                "layer": torch.arange(len(passes)).repeat_interleave(
                    torch.tensor([e.size(1) for e, _ in passes])
                ),
            }
    count = len(layers) * num_experts
    levels = [torch.ones(num_experts) if layer.ghosts is None else layer.ghosts().cpu() for layer in layers]
    nodes = {
        "layer": torch.arange(len(layers)).repeat_interleave(num_experts),
        "index": torch.arange(num_experts).repeat(len(layers)),
        "level": torch.cat(levels),
    }
    return to_hetero({TOKEN: num_tokens, EXPERT: count}, edges, attributes, {EXPERT: nodes})


def _strength(layer: MoELayer, record: Record) -> Tensor | None:
    """How strongly each expert (row) hears each other (column), ``[E, E]``; ``None`` if nobody talks."""
    if record.attention is None or not record.attention.size(0):
        return layer.connections()
    heard, met, _ = attention_of_experts(record)
    experts = slice(record.routing.num_experts)
    return (heard / met.clamp(min=1))[experts, experts]
