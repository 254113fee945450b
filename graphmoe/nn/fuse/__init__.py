from graphmoe.nn.fuse.gated_fusion import GatedFusion
from graphmoe.nn.fuse.projected_fusion import ProjectedFusion
from graphmoe.nn.fuse.sum_fusion import SumFusion

__all__ = ["GatedFusion", "ProjectedFusion", "SumFusion"]
