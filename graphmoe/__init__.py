"""Mixture-of-experts, memory and sparsity as message passing over one typed graph."""

from importlib import import_module

from graphmoe._version import __version__

# Where each public name lives. Nothing is imported before it is asked for (PEP 562), so that
# `import graphmoe` brings neither transformers nor matplotlib with it.
_HOMES = {
    "graphmoe.nn": (
        "AttendConv",
        "CollabConv",
        "ContextualRouter",
        "CoupleConv",
        "DNCCell",
        "DenseRouter",
        "EpisodeMemory",
        "ExpertChoiceRouter",
        "ExpertConv",
        "GatedFusion",
        "GhostGate",
        "HyperCoupleConv",
        "IterativeExpert",
        "MemoryLayer",
        "MoELayer",
        "MocaLayer",
        "ProjectedFusion",
        "ReadConv",
        "RecallConv",
        "RowAttention",
        "SparseExpert",
        "SparseLinear",
        "SumFusion",
        "ThresholdRouter",
        "TopKRouter",
        "WeightedSumConv",
        "WriteConv",
        "edge_form",
        "to_sparse",
    ),
    "graphmoe.models": (
        "GraphMoEConfig",
        "GraphMoEForCausalLM",
        "GraphMoEModel",
        "MemoryTransformer",
        "load",
    ),
    "graphmoe.integrations.upcycling": ("upcycle",),
    "graphmoe.tracing": ("trace",),
    "graphmoe.viz": ("visualize",),
    "graphmoe.errors": ("GraphMoEError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'graphmoe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
