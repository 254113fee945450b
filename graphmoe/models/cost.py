"""What one token costs: the parameters it passes through and the arithmetic it takes."""

from torch import nn

from graphmoe.nn import AttendConv, MoELayer, moe_layers


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token passes through: everything but the experts it does not take.

    The parameters of a coupler count once, although every row of a token passes through them:
    see :func:`forward_flops` for what that costs.
    """
    total = sum(p.numel() for p in model.parameters())
    for layer in moe_layers(model):
        experts = sum(p.numel() for p in layer.experts.parameters())
        total -= experts - experts * _served(layer) // (layer.num_experts + layer.num_ghosts)
    return total


def forward_flops(model: nn.Module, length: int) -> int:
    """Floating-point operations of a forward pass, per token of a sequence of ``length`` tokens.

    A multiplication and an addition count as two. Counted are matrix products: linear maps, experts,
    routers, attention over the tokens before (half the sequence on average) and the mixing of rows;
    normalisation, activations and hyperedge attention are left out.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += 2 * module.weight.numel()
        elif isinstance(module, AttendConv):
            total += 2 * (length + 1) * module.lin_out.in_features
        elif isinstance(module, MoELayer):
            rows = _served(module)
            experts = sum(p.numel() for p in module.experts.parameters())
            total += 2 * module.router.weight.numel()
            total += 2 * experts * rows // (module.num_experts + module.num_ghosts)
            for conv in module.couplers:
                # Every row passes through the coupler's maps, which the first branch counted once.
                maps = sum(m.weight.numel() for m in conv.modules() if isinstance(m, nn.Linear))
                total += 2 * maps * (rows - 1) + 2 * rows * rows * module.in_channels
    return total


def _served(layer: MoELayer) -> int:
    return min(layer.k, layer.num_experts)  # dormant ghosts serve nobody
