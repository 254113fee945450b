from graphmoe.nn.route.capacity import limit_capacity
from graphmoe.nn.route.contextual_router import ContextualRouter
from graphmoe.nn.route.expert_choice_router import ExpertChoiceRouter
from graphmoe.nn.route.router import Router, sort_edges, sort_routes, spread
from graphmoe.nn.route.threshold_router import ThresholdRouter
from graphmoe.nn.route.topk_router import DenseRouter, TopKRouter

__all__ = [
    "ContextualRouter",
    "DenseRouter",
    "ExpertChoiceRouter",
    "Router",
    "ThresholdRouter",
    "TopKRouter",
    "limit_capacity",
    "sort_edges",
    "sort_routes",
    "spread",
]
