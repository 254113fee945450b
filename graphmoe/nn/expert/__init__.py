from graphmoe.nn.expert.expert_conv import ACTIVATIONS, ExpertConv
from graphmoe.nn.expert.feed_forward import FeedForward
from graphmoe.nn.expert.ghost_gate import ACTIVATING, ACTIVE, DORMANT, GhostGate
from graphmoe.nn.expert.iterative_expert import IterativeExpert
from graphmoe.nn.expert.orthogonality import OrthogonalityStrength

__all__ = [
    "ACTIVATING",
    "ACTIVATIONS",
    "ACTIVE",
    "DORMANT",
    "ExpertConv",
    "FeedForward",
    "GhostGate",
    "IterativeExpert",
    "OrthogonalityStrength",
]
