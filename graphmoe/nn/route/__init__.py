from graphmoe.nn.route.routers import DenseRouter, TopKRouter, sort_routes

__all__ = ["DenseRouter", "TopKRouter", "sort_routes"]
