from graphmoe.nn.sparse.weighted_sum_conv import WeightedSumConv

__all__ = ["WeightedSumConv"]
