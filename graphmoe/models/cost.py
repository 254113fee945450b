"""What one token costs: the parameters it passes through and the arithmetic it takes."""

from collections.abc import Sequence

from torch import nn

from graphmoe.nn import (
    AttendConv,
    CollabConv,
    ContextualRouter,
    ExpertChoiceRouter,
    IterativeExpert,
    MemoryLayer,
    MoELayer,
    moe_layers,
)


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token passes through: everything but the experts it does not take.

    Parameters count once, also those of a coupler, which every row of a token passes through in every round,
    and
    those of experts that reason in several steps: see :func:`forward_flops` for what that costs. A contextual
    router lets every expert serve every token.
    """
    total = sum(p.numel() for p in model.parameters())
    for layer in moe_layers(model):
        experts = sum(p.numel() for p in layer.experts.parameters())
        total -= experts - experts * _served(layer) // (layer.num_experts + layer.num_ghosts)
    return total


def forward_flops(model: nn.Module, length: int) -> int:
    """Floating-point operations of a forward pass, per token of a sequence of ``length`` tokens.

    A multiplication and an addition count as two. Counted are matrix products: linear maps, experts,
    routers, attention over the tokens before (half the sequence on average; all of it where attention is not
    causal), the mixing of rows and reading from slots;
    normalisation, activations and hyperedge attention are left out.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += 2 * module.weight.numel()
        elif isinstance(module, AttendConv):
            heard = (length + 1) / 2 if module.causal else length
            total += round(4 * heard * module.lin_out.in_features)
        elif isinstance(module, MemoryLayer):
            # Maps of slots were counted for one of them by the first branch.
            slots = sum(2 * lin.weight.numel() for lin in (module.read.lin_key, module.read.lin_value))
            total += 2 * module.router.weight.numel() + (module.k - 1) * slots
            total += 4 * module.k * module.channels
        elif isinstance(module, MoELayer):
            total += 2 * module.router.weight.numel() + _expert_flops(module)
            if isinstance(module.router, ContextualRouter):
                # Linear maps were counted for one row by the first branch.
                rows = _served(module)
                total += (rows - 1) * _maps(module.router.attention) + _mixing(module, rows)
            total += sum(_coupling_flops(module, conv) for conv in module.couplers)
    return total


def mean_flops(model: nn.Module, lengths: Sequence[int]) -> int:
    """As :func:`forward_flops`, a mean over the tokens of sequences with ``lengths``.

    Experts that choose take whole tokens of every sequence: rounded up, more than ``k`` experts a token.
    """
    tokens = sum(lengths)
    total = forward_flops(model, round(sum(length**2 for length in lengths) / tokens))
    for layer in moe_layers(model):
        if isinstance(layer.router, ExpertChoiceRouter):
            edges = layer.num_experts * sum(layer.router.capacity(length) for length in lengths) / tokens
            total += round(_expert_flops(layer) * (edges / _served(layer) - 1))
    return total


def _expert_flops(layer: MoELayer) -> int:
    weights = sum(p.numel() for p in layer.experts.parameters())
    steps = layer.experts.steps if isinstance(layer.experts, IterativeExpert) else 1
    return 2 * steps * weights * _served(layer) // (layer.num_experts + layer.num_ghosts)


def _coupling_flops(layer: MoELayer, conv: nn.Module) -> int:
    """What a coupler costs beyond one pass through its linear maps, which is counted with the others."""
    rows = min(layer.k, layer.num_experts)
    if not isinstance(conv, CollabConv):
        return (rows - 1) * _maps(conv) + _mixing(layer, rows) // 2
    nodes = rows + (conv.mediator is not None)
    return (nodes * conv.rounds - 1) * _maps(conv) + conv.rounds * _mixing(layer, nodes)


def _maps(module: nn.Module) -> int:
    """Operations of one row in the linear maps of a module."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _mixing(layer: MoELayer, nodes: int) -> int:
    """Operations of attention between the nodes of a token: scores and weighted sums."""
    return 4 * nodes * nodes * layer.in_channels


def _served(layer: MoELayer) -> int:
    """Experts that serve a token, in the mean if they differ in it; dormant ghosts serve nobody."""
    if isinstance(layer.router, ContextualRouter):
        return layer.num_experts
    return min(layer.k, layer.num_experts)
