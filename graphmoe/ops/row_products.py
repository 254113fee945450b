"""Products between the rows of each token, written to given buffers: of every pair, and weighted sums."""

import torch
from torch import Tensor

from graphmoe.ops.memory import empty

PAIRS = 4
"""Most rows of a token whose products are best formed pair by pair."""


class PairProducts:
    """Products of every pair of rows of a token, channel by channel: the cheapest way for very few rows.

    Rows are ``[N, nodes, heads, d]``, and matrices ``[N, nodes, nodes, heads]`` (target, source).
    """

    def __init__(self, like: Tensor, nodes: int, heads: int, head_channels: int, tokens: int):
        self.nodes, self.heads = nodes, heads
        self.pairs = empty(like, tokens, nodes, nodes, heads, head_channels)

    def matrices(self, kept: Tensor) -> Tensor:
        """Part of a buffer ``[N, size]`` as matrices."""
        return kept.view(len(kept), self.nodes, self.nodes, self.heads)

    def of_edges(self, weight: Tensor) -> Tensor:
        """Values of edges ``[N, nodes, nodes]`` (target, source), to be broadcast over the heads."""
        return weight.unsqueeze(3)

    def sum_heads(self, matrices: Tensor) -> Tensor:
        """The reverse."""
        return matrices.sum(dim=3)

    def dot(self, target: Tensor, source: Tensor, out: Tensor) -> None:
        """``out_ij = target_i . source_j``."""
        pairs = self.pairs[: len(out)]
        torch.mul(target.unsqueeze(2), source.unsqueeze(1), out=pairs)
        torch.sum(pairs, 4, out=out)

    def mix(self, matrices: Tensor, source: Tensor, out: Tensor) -> None:
        """``out_i = sum_j matrices_ij source_j``."""
        self._add_up(matrices.unbind(2), source, out)

    def mix_back(self, matrices: Tensor, target: Tensor, out: Tensor) -> None:
        """``out_j = sum_i matrices_ij target_i``."""
        self._add_up(matrices.unbind(1), target, out)

    def _add_up(self, factors: tuple[Tensor, ...], rows: Tensor, out: Tensor) -> None:
        for node, factor in enumerate(factors):
            product = (factor.unsqueeze(3), rows[:, node].unsqueeze(1))
            torch.mul(*product, out=out) if node == 0 else out.addcmul_(*product)


class BatchProducts:
    """The same products as batches of small matrices, head by head, read where they lie among the rows.

    Matrices are ``[heads, N, nodes, nodes]`` (source, target): a softmax over the last of few columns is
    slow.
    """

    def __init__(self, like: Tensor, nodes: int, heads: int, head_channels: int, tokens: int):
        self.nodes, self.heads = nodes, heads
        self.mixed = empty(like, heads, tokens, nodes, head_channels)

    def matrices(self, kept: Tensor) -> Tensor:
        return kept.view(self.heads, len(kept), self.nodes, self.nodes)

    def of_edges(self, weight: Tensor) -> Tensor:
        return weight.mT.contiguous()

    def sum_heads(self, matrices: Tensor) -> Tensor:
        return matrices.sum(dim=0).mT

    def dot(self, target: Tensor, source: Tensor, out: Tensor) -> None:
        for h, products in enumerate(out):
            torch.bmm(source[:, :, h], target[:, :, h].mT, out=products)

    def mix(self, matrices: Tensor, source: Tensor, out: Tensor) -> None:
        self.mix_back(matrices.mT, source, out)

    def mix_back(self, matrices: Tensor, target: Tensor, out: Tensor) -> None:
        mixed = self.mixed[:, : len(out)]
        for h, product in enumerate(mixed):
            torch.bmm(matrices[h], target[:, :, h], out=product)
        out.copy_(mixed.permute(1, 2, 0, 3))
