from torch import nn


def is_bare(lin: nn.Module) -> bool:
    """Whether a linear layer is its weight and nothing else, no adapter and no hook, so that a kernel
    may use the weight in its place."""
    return type(lin) is nn.Linear and not (lin._forward_hooks or lin._forward_pre_hooks)
