"""Blocks of tokens that stay in the cache of a CPU while several products pass over them."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of the rows of a block, per thread: about the second-level cache of a core.
BLOCK = 1 << 20


def suits_blocks(*tensors: Tensor) -> bool:
    """Whether working block by block pays: on a CPU. A compiler fuses by itself, autocast chooses
    precisions by itself, and a GPU wants large products."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and all(t.dtype == first.dtype for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def fills_blocks(x: Tensor) -> bool:
    """Whether ``x`` is a quarter of a block or more: below it, the bookkeeping takes longer than it saves
    where many small steps replace few operators."""
    return 4 * x.numel() * x.element_size() >= BLOCK


def tokens_per_block(x: Tensor) -> int:
    """Tokens of ``x [N, nodes, F]`` in one block, at least 1."""
    token = max(x.size(1) * x.size(2) * x.element_size(), 1)
    return max(1, min(x.size(0), BLOCK * torch.get_num_threads() // token))


def blocks(x: Tensor) -> Iterator[slice]:
    """The blocks of tokens of ``x [N, nodes, F]``."""
    step = tokens_per_block(x)
    return (slice(start, min(start + step, x.size(0))) for start in range(0, x.size(0), step))


def flat(rows: Tensor) -> Tensor:
    """The rows of all tokens, ``[N * nodes, F]``, without a copy."""
    return rows.view(-1, rows.size(-1))
