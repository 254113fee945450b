from torch import nn


def is_bare(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer of ``kind`` is its weights and nothing else, no adapter and no hook, so that a kernel
    may use the weights in its place."""
    heard = module._forward_hooks or module._forward_pre_hooks
    heard = heard or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not heard
