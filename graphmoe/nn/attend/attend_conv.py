from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import softmax

from graphmoe.errors import ConfigError, GraphError
from graphmoe.graph import both_ends, dense_to_edges, to_edges
from graphmoe.graph import causal as causal_edges
from graphmoe.nn.attend.rotary import rotate
from graphmoe.nn.lazy import lazy_channels


@lazy_channels
class AttendConv(MessagePassing):
    r"""Multi-head attention along the edges ``token --attends--> token``
    (`Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_), with grouped keys and values
    (`GQA <https://arxiv.org/abs/2305.13245>`_) and rotary positions.

    .. math::
        y_i = W_o \sum_{j \to i} \mathrm{softmax}_j\!\left(\frac{q_i^\top k_j}{\sqrt d}\right) v_j

    On ``x [N, D]`` it is a graph convolution over any ``edge_index``. On sequences ``x [B, T, D]``
    every token attends to itself and all earlier ones, or with ``causal=False`` to all tokens of its
    sequence, through scaled dot-product attention. A token that may look at nobody hears 0.

    Edges: token -> token (source = key, target = query).

    Args:
        in_channels: Channels ``D``; ``-1``: those of the first input.
        heads: Query heads; must divide ``D``.
        kv_heads: Key and value heads; must divide ``heads``. Default: ``heads``.
        dropout: On attention weights, in training.
        causal: Whether tokens of a sequence attend to earlier ones only; False is for encoders, which have no
            cache. A ``mask`` or an ``edge_index`` decides instead.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``x [N, D]`` with ``edge_index``, a tensor ``[2, M]`` or ``adj_t``, whose values are
          ignored, or a pair of such ``x`` of sources and targets, without positions; or ``x [B, T, D]``;
          ``position``: pair ``(cos, sin)`` of :func:`rotary`, each ``[N, d / 2]`` or ``[B, T, d / 2]``, or
          ``None`` for no positions; ``mask [B, 1, T, S]`` bool, True where a query may look; ``cache``: any
          object with ``update(key, value, layer) -> (key, value)`` over ``[B, kv_heads, S, d]``.
        - **output:** as ``x`` (of the targets); with ``return_attention_weights=True`` (edge form) also
          ``(edge_index, weights [M, heads])``.

    Raises:
        ConfigError: Heads that do not divide; a cache without ``causal``.
        GraphError: ``edge_index`` that is no graph of these nodes; a pair without one, or with positions.
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        causal: bool = True,
        **kwargs,
    ):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or in_channels % heads:
            raise ConfigError("heads must divide the channels", "heads", f"a divisor of {in_channels}", heads)
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(
                "key-value heads must divide the heads", "kv_heads", f"a divisor of {heads}", kv_heads
            )
        self.in_channels, self.heads, self.kv_heads = in_channels, heads, kv_heads
        self.head_channels, self.dropout, self.causal = in_channels // heads, dropout, causal
        self.fuse = True
        self.lin_query = nn.Linear(in_channels, in_channels, bias=False)
        self.lin_key = nn.Linear(in_channels, kv_heads * self.head_channels, bias=False)
        self.lin_value = nn.Linear(in_channels, kv_heads * self.head_channels, bias=False)
        self.lin_out = nn.Linear(in_channels, in_channels, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for lin in (self.lin_query, self.lin_key, self.lin_value, self.lin_out):
            lin.reset_parameters()

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | None = None,
        position: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        cache: object | None = None,
        layer: int = 0,
        return_attention_weights: bool = False,
    ):
        source, x = both_ends(x)
        if source is not x and (edge_index is None or position is not None):
            what = "sources and targets stand side by side only along edges, and have no positions"
            raise GraphError(what, "x", "features of all nodes", "a pair")
        query = self._heads(self.lin_query(x), position)  # [*, heads, d]
        key = self._heads(self.lin_key(source), position)  # [*, kv_heads, d]
        value = self._heads(self.lin_value(source), None)
        if edge_index is not None:
            edges = to_edges(edge_index, (source.size(0), x.size(0)))
            out, edges, weights = self._edges(query, key, value, edges)
            out = self.lin_out(out)
            return (out, (edges, weights)) if return_attention_weights else out

        # [B, T, heads, d] -> [B, heads, T, d], the layout of caches and of SDPA.
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            if not self.causal:
                what = "tokens that look ahead would have to be computed again with every new one"
                raise ConfigError(what, "cache", "None, or causal attention", type(cache).__name__)
            key, value = cache.update(key, value, layer)
        if self.fuse and not return_attention_weights:
            length, total = query.size(2), key.size(2)
            if mask is None and 1 < length < total:  # a chunk behind cached keys
                mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
            # is_causal with one query and many keys would let it look at the first key only.
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=self.causal and mask is None and length > 1,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.kv_heads != self.heads,
            ).transpose(1, 2).flatten(2)  # fmt: skip
            return self.lin_out(out)
        batch, _, length, _ = query.shape
        total = key.size(2)
        if mask is None and self.causal:
            edges = causal_edges(batch, length, past=total - length, device=x.device)
        elif mask is None:
            edges = dense_to_edges(torch.ones(batch, length, total, dtype=torch.bool, device=x.device))
        else:
            edges = dense_to_edges(mask.expand(batch, 1, length, total).squeeze(1))
        nodes = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
        out, edges, weights = self._edges(*nodes, edges)
        out = self.lin_out(out.view(batch, length, -1))
        return (out, (edges, weights)) if return_attention_weights else out

    def _heads(self, x: Tensor, position: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_channels))
        return x if position is None else rotate(x, *(angle.unsqueeze(-2) for angle in position))

    def _edges(
        self, query: Tensor, key: Tensor, value: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Edge form: ``query [N, heads, d]``, ``key`` and ``value [S, kv_heads, d]``."""
        key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (key, value))
        size = (key.size(0), query.size(0))
        alpha = self.edge_updater(edge_index, query=(None, query), key=(key, None), size=size)
        out = self.propagate(edge_index, value=(value, None), alpha=alpha, size=size)
        return out.flatten(1), edge_index, alpha

    def edge_update(self, query_i: Tensor, key_j: Tensor, index: Tensor, size_i: Optional[int]) -> Tensor:  # noqa: UP045 (PyG reads it)
        score = (query_i * key_j).sum(dim=-1) * self.head_channels**-0.5
        alpha = softmax(score, index, num_nodes=size_i)
        return F.dropout(alpha, self.dropout, self.training)

    def message(self, value_j: Tensor, alpha: Tensor) -> Tensor:
        return alpha.unsqueeze(-1) * value_j

    def __repr__(self) -> str:
        past = "" if self.causal else ", causal=False"
        return (
            f"{type(self).__name__}({self.in_channels}, heads={self.heads}, kv_heads={self.kv_heads}{past})"
        )
