"""Pictures of a training run or of one traced pass of a model: records in, matplotlib figures out.

A plot is a pure function ``RunRecord -> Figure``. To add one, write it in the file of its family and
give it a line in :data:`PLOTS`. Several runs side by side are :func:`analysis.compare.compare`.
"""

from collections.abc import Callable

from matplotlib.figure import Figure

from analysis.coactivation import expert_coactivation, is_choice
from analysis.collaboration import collaboration_attention, mediator_gate
from analysis.connections import (
    expert_connections,
    expert_connections_change,
    expert_connections_over_time,
)
from analysis.curves import has_curves, training_curves
from analysis.dnc import dnc_links, dnc_memory, has_dnc
from analysis.few_shot import few_shot_accuracy, has_episode, has_few_shot, memory_episode
from analysis.ghost import ghost_timeline
from analysis.hyperedges import hyperedge_weights
from analysis.hypergraph import hypergraph
from analysis.inference import inference_knobs
from analysis.load import drop_rate, expert_load, expert_load_over_time
from analysis.lottery import has_lottery, has_ticket_pixels, lottery_curve, ticket_layers, ticket_pixels
from analysis.memory import copy_accuracy, has_copies, has_memory, has_slot_load, memory_map, slot_load
from analysis.orthogonality import orthogonality
from analysis.routing import is_compared, is_routed
from analysis.routing_decisions import routing_decisions
from analysis.routing_graph import routing_graph
from analysis.routing_load import routing_load
from analysis.routing_tokens import routing_tokens
from analysis.series import INFERENCE, has, steps
from analysis.sparse import (
    degree_distribution,
    edge_ages,
    edge_survival,
    has_feeds,
    has_pixels,
    has_survival,
    pixel_importance,
    sparse_mask,
)
from analysis.specialisation import expert_similarity, routing_information, specialisation
from graphmoe.checkpoint import RunRecord

__all__ = ["PLOTS", "plots"]

Plot = Callable[[RunRecord], Figure]

PLOTS: dict[Plot, Callable[[RunRecord], bool]] = {
    training_curves: has_curves,
    expert_load: lambda record: _several(record, "load"),
    expert_load_over_time: lambda record: _several(record, "load"),
    drop_rate: lambda record: has(record, "drop_rate"),
    expert_coactivation: lambda record: (
        has(record, "final_coactivation", "final_coactivation_random") and is_choice(record)
    ),
    expert_connections: lambda record: _several(record, "coupling"),
    expert_connections_change: lambda record: _several(record, "coupling") and len(steps(record)) > 1,
    expert_connections_over_time: lambda record: _several(record, "coupling") and len(steps(record)) > 1,
    hypergraph: lambda record: has(record, "incidence"),
    hyperedge_weights: lambda record: has(record, "hyperedge_weight", "incidence"),
    ghost_timeline: lambda record: has(record, "ghost_level"),
    collaboration_attention: lambda record: has(record, "final_attention", "final_attention_uniform"),
    mediator_gate: lambda record: has(record, "mediator_gate") or has(record, "final_mediator_gate"),
    inference_knobs: lambda record: has(record, "final_inference_loss", *INFERENCE),
    specialisation: lambda record: _several(record, "load") and has(record, "specialisation"),
    expert_similarity: lambda record: _several(record, "final_cka"),
    routing_information: lambda record: _routed(record),
    memory_map: has_memory,
    slot_load: has_slot_load,
    copy_accuracy: has_copies,
    dnc_memory: has_dnc,
    dnc_links: has_dnc,
    memory_episode: has_episode,
    few_shot_accuracy: has_few_shot,
    orthogonality: lambda record: has(record, "orthogonality_strength") or has(record, "overlap"),
    edge_survival: has_survival,
    edge_ages: has_feeds,
    degree_distribution: has_feeds,
    sparse_mask: has_feeds,
    pixel_importance: has_pixels,
    lottery_curve: has_lottery,
    ticket_layers: has_lottery,
    ticket_pixels: has_ticket_pixels,
    routing_load: is_routed,
    routing_tokens: is_routed,
    routing_graph: is_compared,
    routing_decisions: is_routed,
}
"""Every plot, and whether a run has what it draws."""


def _several(record: RunRecord, key: str) -> bool:
    """Whether ``key`` was recorded for more than one expert: a dense model has no choice to show."""
    return has(record, key) and record.records[key].shape[-1:] != (1,)


def _routed(record: RunRecord) -> bool:
    """Whether anything is known about how tokens were routed, and there was a choice."""
    known = ("routing_entropy", "final_routing_entropy", "final_mutual_information")
    return _several(record, "load") and any(has(record, key) for key in known)


def plots(record: RunRecord) -> dict[str, Plot]:
    """Return the plots that fit a run, by name: no ghosts, no ghost plot.

    Args:
        record: The run, as :func:`graphmoe.checkpoint.read` returns it.
    """
    return {plot.__name__: plot for plot, fits in PLOTS.items() if fits(record)}
