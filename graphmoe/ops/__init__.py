from graphmoe.ops.grouped_mlp import grouped_mlp

__all__ = ["grouped_mlp"]
