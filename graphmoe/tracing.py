"""A forward pass as the typed graph."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from graphmoe.errors import ConfigError, GraphError
from graphmoe.graph import to_hetero
from graphmoe.integrations import hf_trace
from graphmoe.nn import AttendConv, MemoryLayer, MoELayer, edge_form, moe_layers
from graphmoe.nn.rows import attention_of_experts
from graphmoe.typing import (
    ANSWERS,
    ATTENDS,
    COUPLES,
    EXPERT,
    ROUTES,
    SLOT,
    TOKEN,
    WRITES,
    MemoryRecord,
    Record,
)


class _Edges(NamedTuple):
    """Edges of one type in one layer: ``edge_index [2, M]``, ``weight [M]``, number of the layer."""

    edge_index: Tensor
    weight: Tensor
    layer: int


def trace(model: nn.Module, *, attention: bool | None = None, **inputs: Tensor) -> HeteroData:
    r"""Run ``model`` once, in eval mode and without gradients, and return what passed between its nodes.

    Nodes: ``token`` (position ``b * T + t``; attributes ``batch``, the sequence ``b``, ``present``, false for
    padding, and ``input_ids`` if they were given) and ``expert`` (those of the first MoE layer, then those of
    the next: ``layer * E + e`` where every layer has ``E``; attributes ``layer``, ``index`` and ``level``).
    Edges, each with ``weight`` and ``layer``: ``token routes expert`` (routing weight), ``token attends
    token`` (attention, mean over heads) and of experts that are coupled ``expert couples expert``: the part
    of a coupling's strength that is the same for all tokens, or of collaborating experts the attention of one
    to another, mean over the tokens that have both, heads and rounds (mediators are no nodes of it). Of a
    model with a memory also the nodes ``slot`` (of every layer and sequence one for each slot; attributes
    ``layer``, ``index`` and ``batch``) and the edges ``token writes slot`` (routing weight times write gate)
    and ``slot answers token`` (attention, mean over heads), to be read in the order of the tokens: a slot
    answers with what earlier tokens wrote.

    Of transformers' models (Mixtral, Qwen MoE, OLMoE, DeepSeek, GPT-OSS and every other whose experts are
    dispatched by its ``use_experts_implementation``) the edges are those that the experts were given: after
    grouping, balancing biases, normalisation and scaling. ``layer`` is the number of the decoder layer,
    dense ones included. Shared experts serve every token and are no nodes. Where a model is spread over
    processes by expert parallelism, each sees the experts it holds.

    Padding (``attention_mask [B, T]``) has no routing edges, and no attention in transformers' models.

    Args:
        model: A model of this library, or one of transformers with MoE layers.
        attention: Trace attention, too, which takes memory for ``T * T`` edges a sequence and layer.
            Default: for models of this library, which then run edge by edge; of transformers' only if
            asked for, with the eager implementation for this pass.
        **inputs: What its forward takes, such as ``input_ids [B, T]``, on the devices where it takes them.

    Raises:
        ConfigError: The model has neither MoE layer nor memory that can be traced, neither ``input_ids`` nor
            ``inputs_embeds`` is given to a model of transformers, or its attention cannot be had.
    """
    layers = moe_layers(model)
    own = bool(layers) or any(isinstance(module, MemoryLayer) for module in model.modules())
    if not own and not hf_trace.expert_modules(model):
        expected = "a model with MoELayers, MemoryLayers or with experts that transformers dispatches"
        raise ConfigError("nothing to trace", "model", expected, type(model).__name__)
    with _in_eval_mode(model), torch.no_grad():
        if own:
            return _trace_own(model, layers, inputs, attention=attention is not False)
        return _trace_transformers(model, inputs, attention=bool(attention))


def coactivation(data: HeteroData) -> dict[int, Tensor]:
    """How often experts serve the same token in a traced pass, layer by layer.

    Compare with :func:`graphmoe.metrics.random_coactivation` of the diagonal.

    Args:
        data: What :func:`trace` returned.

    Returns:
        ``[E, E]`` float64 by number of the layer, symmetric, in [0, 1]: the share of the tokens with an
        edge in this layer that both serve; on the diagonal that one expert serves.

    Raises:
        GraphError: ``data`` has no edge type ``token routes expert``.
    """
    if ROUTES not in data.edge_types:
        raise GraphError(
            "not a traced pass", "data", "__".join(ROUTES), ["__".join(e) for e in data.edge_types]
        )
    (token, expert), layer_of = data[ROUTES].edge_index, data[EXPERT].layer
    shares = {}
    for layer in layer_of.unique().tolist():
        nodes, mine = (layer_of == layer).nonzero().flatten(), data[ROUTES].layer == layer
        serves = torch.zeros(data[TOKEN].num_nodes, nodes.numel(), dtype=torch.float64)
        serves[token[mine], torch.searchsorted(nodes, expert[mine])] = 1
        shares[layer] = serves.t() @ serves / serves.any(dim=1).sum().clamp(min=1)
    return shares


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context all of ``model`` is in eval mode; then every module is as before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _tokens(inputs: dict[str, Tensor]) -> tuple[int | None, dict[str, Tensor]]:
    """Number of tokens of a pass, ``None`` if its inputs do not tell, and their attributes, each ``[N]``."""
    ids, embeds, mask = (inputs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask"))
    given = embeds if ids is None else ids
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None, {}
    sequences, steps = given.shape[:2]
    present = torch.ones(sequences, steps, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        present = mask[:, -steps:].bool().cpu()  # a mask may begin with the tokens of a cache
    batch = torch.arange(sequences).repeat_interleave(steps)
    attributes = {"batch": batch, "present": present.reshape(-1)}
    return sequences * steps, attributes | ({} if ids is None else {"input_ids": ids.reshape(-1).cpu()})


# Models of transformers ------------------------------------------------------------------------


def _trace_transformers(model: nn.Module, inputs: dict[str, Tensor], *, attention: bool) -> HeteroData:
    num_tokens, tokens = _tokens(inputs)
    if num_tokens is None:
        what, expected = "there are no tokens to trace", "a tensor [B, T] or [B, T, D]"
        raise ConfigError(what, "input_ids or inputs_embeds", expected, sorted(inputs))
    found = hf_trace.run(model, inputs, num_tokens, attention=attention)
    routes, attends, first = [], [], 0
    for layer, num_experts, index, weight in found.served:
        # transformers routes padding as well, and marks experts of other processes by an id of E or more.
        live = (index >= 0) & (index < num_experts) & tokens["present"].unsqueeze(1)  # [N, k]
        edges = torch.stack([live.nonzero()[:, 0], index[live] + first])
        routes.append(_Edges(edges, weight[live], layer))
        first += num_experts
    for layer, weights in enumerate(found.attention or ()):
        attends.append(_attends(weights, tokens["present"], layer))
    nodes = _experts([(served.layer, served.num_experts) for served in found.served])
    nodes["level"] = torch.ones(first)
    return _assemble(num_tokens, tokens, nodes, {ATTENDS: attends, ROUTES: routes})


def _attends(weights: Tensor, present: Tensor, layer: int) -> _Edges:
    """Attention ``[B, T, S]`` as edges between the tokens of the pass, the last ``T`` keys."""
    steps = weights.size(1)
    weights, present = weights[..., -steps:], present.view(-1, steps)
    sequence, query, key = (
        (weights > 0) & present.unsqueeze(1) & present.unsqueeze(2)
    ).nonzero(as_tuple=True)  # fmt: skip
    edges = torch.stack([sequence * steps + key, sequence * steps + query])
    return _Edges(edges, weights[sequence, query, key], layer)


# Models of this library ------------------------------------------------------------------------


def _trace_own(
    model: nn.Module, layers: list[MoELayer], inputs: dict[str, Tensor], *, attention: bool
) -> HeteroData:
    attends: list[_Edges] = []
    remembered: list[MemoryRecord] = []
    hooks, tracked = [], [layer.track_attention for layer in layers]
    try:
        for module in model.modules():
            if attention and isinstance(module, AttendConv):
                hooks.append(module.register_propagate_forward_pre_hook(_keep_attention(attends)))
            if isinstance(module, MemoryLayer):
                hooks.append(module.register_forward_hook(lambda _, args, out: remembered.append(out[2])))
        for layer in layers:
            layer.track_attention = True
        with edge_form(model) if attention else nullcontext():
            records = model(**inputs, output_records=True, use_cache=False).records or ()
    finally:
        for hook in hooks:
            hook.remove()
        for layer, before in zip(layers, tracked, strict=True):
            layer.track_attention = before
    num_tokens, tokens = _tokens(inputs)
    if num_tokens is None:
        num_tokens = [*records, *remembered][0].routing.logits.size(0)
    routes, couples, first = [], [], 0
    for index, (layer, record) in enumerate(zip(layers, records, strict=True)):
        live = int(record.routing.ptr[-1])  # rows behind it are absent edges
        token = _places(record, tokens, num_tokens)[record.routing.token[:live].cpu()]
        edges = torch.stack([token, record.routing.expert[:live].cpu() + first])
        routes.append(_Edges(edges, record.routing.weight[:live].float().cpu(), index))
        strength = _strength(layer, record)
        if strength is not None:
            to, source = (strength > 0).nonzero(as_tuple=True)
            edges = torch.stack([source, to]) + first
            couples.append(_Edges(edges.cpu(), strength[to, source].float().cpu(), index))
        first += record.routing.num_experts
    nodes = _experts([(index, record.routing.num_experts) for index, record in enumerate(records)])
    awake = [
        torch.ones(layer.num_experts) if layer.ghosts is None else layer.ghosts().cpu() for layer in layers
    ]
    nodes["level"] = torch.cat([*awake, torch.zeros(0)])
    passes = {ATTENDS: attends, ROUTES: routes, COUPLES: couples}
    slots = {}
    if remembered:
        slots, passes[WRITES], passes[ANSWERS] = _memories(remembered, tokens, num_tokens)
    return _assemble(num_tokens, tokens, nodes, passes, slots)


def _places(record: Record | MemoryRecord, tokens: dict[str, Tensor], num_tokens: int) -> Tensor:
    """Where the tokens of a record stand among all of the pass: those of padding may have been left out."""
    count = record.routing.logits.size(0)
    return torch.arange(count) if count == num_tokens else tokens["present"].nonzero().flatten()


def _memories(
    records: list[MemoryRecord], tokens: dict[str, Tensor], num_tokens: int
) -> tuple[dict[str, Tensor], list[_Edges], list[_Edges]]:
    """Attributes of the slots of all memories and sequences, who wrote them and whom they answered."""
    sequence = tokens.get("batch", torch.zeros(num_tokens, dtype=torch.long))
    count = int(sequence.max()) + 1 if num_tokens else 0
    layer_of, index_of, batch_of, writes, answers, first = [], [], [], [], [], 0
    for layer, record in enumerate(records):
        routing, live = record.routing, int(record.routing.ptr[-1])
        size, k = routing.num_experts, max(routing.k, 1)
        local, place = routing.token[:live].cpu(), routing.perm[:live].cpu() % k
        token = _places(record, tokens, num_tokens)[local]
        slot = first + sequence[token] * size + routing.expert[:live].cpu()
        strength = routing.weight[:live].float().cpu() * record.gate.float().cpu()[local]
        wrote = strength > 0
        writes.append(_Edges(torch.stack([token, slot])[:, wrote], strength[wrote], layer))
        heard = record.read.float().cpu()[local, :, place].mean(dim=1)
        answers.append(_Edges(torch.stack([slot, token]), heard, layer))
        layer_of.append(torch.full((count * size,), layer))
        index_of.append(torch.arange(size).repeat(count))
        batch_of.append(torch.arange(count).repeat_interleave(size))
        first += count * size
    names = ("layer", "index", "batch")
    parts = (layer_of, index_of, batch_of)
    return {name: torch.cat(part) for name, part in zip(names, parts, strict=True)}, writes, answers


def _keep_attention(kept: list[_Edges]):
    def hook(conv: AttendConv, inputs: tuple) -> None:
        edge_index, _, arguments = inputs
        kept.append(_Edges(edge_index.cpu(), arguments["alpha"].mean(dim=-1).cpu(), len(kept)))

    return hook


def _strength(layer: MoELayer, record: Record) -> Tensor | None:
    """How strongly each expert (row) hears each other (column), ``[E, E]``; ``None`` if nobody talks."""
    if record.attention is None or not record.attention.size(0):
        return layer.connections()
    heard, met, _ = attention_of_experts(record)
    experts = slice(record.routing.num_experts)
    return (heard / met.clamp(min=1))[experts, experts]


# The graph -------------------------------------------------------------------------------------


def _experts(layers: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Attributes of the expert nodes, given number and experts of each MoE layer."""
    number, count = torch.tensor(layers, dtype=torch.long).view(-1, 2).unbind(dim=1)
    return {
        "layer": number.repeat_interleave(count),
        "index": torch.cat([torch.arange(experts) for experts in [0, *count.tolist()]]),
    }


def _assemble(
    num_tokens: int,
    tokens: dict[str, Tensor],
    experts: dict[str, Tensor],
    passes: dict[tuple[str, str, str], list[_Edges]],
    slots: dict[str, Tensor] | None = None,
) -> HeteroData:
    edges, attributes = {}, {}
    for edge_type, layers in passes.items():
        if layers:
            edges[edge_type] = torch.cat([layer.edge_index for layer in layers], dim=1)
            sizes = torch.tensor([layer.edge_index.size(1) for layer in layers])
            attributes[edge_type] = {
                "weight": torch.cat([layer.weight for layer in layers]),
                "layer": torch.tensor([layer.layer for layer in layers]).repeat_interleave(sizes),
            }
    nodes = {TOKEN: tokens, EXPERT: experts} | ({SLOT: slots} if slots else {})
    counts = {TOKEN: num_tokens, EXPERT: experts["index"].numel()}
    counts |= {SLOT: slots["index"].numel()} if slots else {}
    return to_hetero(counts, edges, attributes, nodes)
