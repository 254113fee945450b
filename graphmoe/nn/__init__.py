from graphmoe.nn.attend import AttendConv, rotary
from graphmoe.nn.block import Block
from graphmoe.nn.couple import CollabConv, CoupleConv, HyperCoupleConv
from graphmoe.nn.edge_form import edge_form
from graphmoe.nn.expert import (
    ExpertConv,
    FeedForward,
    GhostGate,
    IterativeExpert,
    OrthogonalityStrength,
)
from graphmoe.nn.fuse import GatedFusion, ProjectedFusion, SumFusion
from graphmoe.nn.memory import MemoryBank, ReadConv, WriteConv
from graphmoe.nn.memory_layer import MemoryLayer
from graphmoe.nn.moe import MoELayer, moe_layers
from graphmoe.nn.norm import RMSNorm
from graphmoe.nn.route import (
    ContextualRouter,
    DenseRouter,
    ExpertChoiceRouter,
    ThresholdRouter,
    TopKRouter,
    limit_capacity,
)
from graphmoe.nn.row_attention import RowAttention

__all__ = [
    "AttendConv",
    "Block",
    "CollabConv",
    "ContextualRouter",
    "CoupleConv",
    "DenseRouter",
    "ExpertChoiceRouter",
    "ExpertConv",
    "FeedForward",
    "GatedFusion",
    "GhostGate",
    "HyperCoupleConv",
    "IterativeExpert",
    "MemoryBank",
    "MemoryLayer",
    "MoELayer",
    "OrthogonalityStrength",
    "ProjectedFusion",
    "RMSNorm",
    "ReadConv",
    "RowAttention",
    "SumFusion",
    "ThresholdRouter",
    "TopKRouter",
    "WriteConv",
    "edge_form",
    "limit_capacity",
    "moe_layers",
    "rotary",
]
