from graphmoe.nn.sparse.byte_dropout import ByteDropout
from graphmoe.nn.sparse.convert import to_sparse
from graphmoe.nn.sparse.density import DISTRIBUTIONS, allocate_density, er_total_density
from graphmoe.nn.sparse.network import feeds
from graphmoe.nn.sparse.sparse_linear import GROWTH, SparseLinear
from graphmoe.nn.sparse.weighted_sum_conv import WeightedSumConv

__all__ = [
    "DISTRIBUTIONS",
    "GROWTH",
    "ByteDropout",
    "SparseLinear",
    "WeightedSumConv",
    "allocate_density",
    "er_total_density",
    "feeds",
    "to_sparse",
]
