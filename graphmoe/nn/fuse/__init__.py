from graphmoe.nn.fuse.sum_fusion import SumFusion

__all__ = ["SumFusion"]
