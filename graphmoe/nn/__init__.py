from graphmoe.nn.attend import AttendConv, rotary
from graphmoe.nn.block import Block
from graphmoe.nn.couple import CoupleConv, HyperCoupleConv
from graphmoe.nn.edge_form import edge_form
from graphmoe.nn.expert import ExpertConv, FeedForward, GhostGate, OrthogonalityStrength
from graphmoe.nn.fuse import ProjectedFusion, SumFusion
from graphmoe.nn.moe import MoELayer, moe_layers
from graphmoe.nn.route import DenseRouter, TopKRouter

__all__ = [
    "AttendConv",
    "Block",
    "CoupleConv",
    "DenseRouter",
    "ExpertConv",
    "FeedForward",
    "GhostGate",
    "HyperCoupleConv",
    "MoELayer",
    "OrthogonalityStrength",
    "ProjectedFusion",
    "SumFusion",
    "TopKRouter",
    "edge_form",
    "moe_layers",
    "rotary",
]
