from graphmoe.nn.attend import AttendConv, rotary
from graphmoe.nn.block import Block
from graphmoe.nn.couple import CollabConv, CoupleConv, HyperCoupleConv
from graphmoe.nn.edge_form import edge_form
from graphmoe.nn.episode_memory import EpisodeMemory, EpisodeState
from graphmoe.nn.expert import (
    ExpertConv,
    FeedForward,
    GhostGate,
    IterativeExpert,
    OrthogonalityStrength,
)
from graphmoe.nn.fuse import GatedFusion, ProjectedFusion, SumFusion
from graphmoe.nn.lazy import lazy_channels
from graphmoe.nn.memory import (
    ContentConv,
    DNCCell,
    DNCMemory,
    LinkConv,
    MemoryBank,
    ReadConv,
    RecallConv,
    SlotWriteConv,
    WriteConv,
)
from graphmoe.nn.memory_layer import MemoryLayer
from graphmoe.nn.moca import MocaLayer
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
from graphmoe.nn.sparse import SparseLinear, WeightedSumConv, to_sparse
from graphmoe.nn.sparse_expert import SparseExpert

__all__ = [
    "AttendConv",
    "Block",
    "CollabConv",
    "ContentConv",
    "ContextualRouter",
    "CoupleConv",
    "DNCCell",
    "DNCMemory",
    "DenseRouter",
    "EpisodeMemory",
    "EpisodeState",
    "ExpertChoiceRouter",
    "ExpertConv",
    "FeedForward",
    "GatedFusion",
    "GhostGate",
    "HyperCoupleConv",
    "IterativeExpert",
    "LinkConv",
    "MemoryBank",
    "MemoryLayer",
    "MoELayer",
    "MocaLayer",
    "OrthogonalityStrength",
    "ProjectedFusion",
    "RMSNorm",
    "ReadConv",
    "RecallConv",
    "RowAttention",
    "SlotWriteConv",
    "SparseExpert",
    "SparseLinear",
    "SumFusion",
    "ThresholdRouter",
    "TopKRouter",
    "WeightedSumConv",
    "WriteConv",
    "edge_form",
    "lazy_channels",
    "limit_capacity",
    "moe_layers",
    "rotary",
    "to_sparse",
]
