from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch_geometric.nn import MessagePassing


@contextmanager
def edge_form(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context every convolution of ``model`` passes messages edge by edge.

    For oracles, message hooks and explanations; the numbers are those of the fast forms.
    """
    convs = [m for m in model.modules() if isinstance(m, MessagePassing)]
    before = [conv.fuse for conv in convs]
    try:
        for conv in convs:
            conv.fuse = False
        yield model
    finally:
        for conv, fuse in zip(convs, before, strict=True):
            conv.fuse = fuse
