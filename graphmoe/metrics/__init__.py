r"""Measures of specialisation and routing, each beside what chance alone would give.

Pure functions of tensors; nothing here is trained on. Entropies and information are in bits.
"""

from graphmoe.metrics.experts import linear_cka, random_cka, random_specialisation, specialisation
from graphmoe.metrics.information import mutual_information, shuffled_mutual_information
from graphmoe.metrics.pairs import coactivation, random_coactivation, serving
from graphmoe.metrics.routing import (
    RouterCounts,
    count_routes,
    load_entropy,
    max_violation,
    random_drop_rate,
    random_max_violation,
    router_metrics,
    routing_entropy,
)

__all__ = [
    "RouterCounts",
    "coactivation",
    "count_routes",
    "linear_cka",
    "load_entropy",
    "max_violation",
    "mutual_information",
    "random_cka",
    "random_coactivation",
    "random_drop_rate",
    "random_max_violation",
    "random_specialisation",
    "router_metrics",
    "routing_entropy",
    "serving",
    "shuffled_mutual_information",
    "specialisation",
]
