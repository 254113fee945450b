from graphmoe.nn.route.capacity import limit_capacity
from graphmoe.nn.route.contextual_router import ContextualRouter
from graphmoe.nn.route.routers import DenseRouter, TopKRouter, sort_routes

__all__ = ["ContextualRouter", "DenseRouter", "TopKRouter", "limit_capacity", "sort_routes"]
