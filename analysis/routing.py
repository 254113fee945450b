"""What one traced pass has shown, checked: every plot of a trace reads its numbers through here.

The records are those of :func:`graphmoe.trace_record.trace_record`. Shapes: N tokens, L MoE layers, E experts
of the layer that has most, P layers whose experts are compared pair by pair.
"""

import json
from typing import NamedTuple

import numpy as np

from analysis.series import ROUTED, array, has
from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError


class Routed(NamedTuple):
    """The records of a trace.

    Attributes:
        labels: Text of each token.
        layers: Number of each MoE layer among the decoder layers, ``[L]``.
        sequence: Sequence of each token, ``[N]``.
        degree: Experts that serve a token, ``[N, L]``.
        first: The one of the largest weight, ``[N, L]``, -1 without any.
        first_weight: Its share of the token's weights, ``[N, L]``.
        entropy: Entropy of the token's weights, bits, ``[N, L]``.
        load: Edges of each expert, ``[L, E]``, NaN where there is no live expert.
        max_violation: MaxVio of a blind choice, ``[L]``.
        dead: Experts without an edge of a blind choice, ``[L]``.
        compared: Which of the layers are compared pair by pair, ``[P]``.
        together: Share of the tokens that both serve, ``[P, E, E]``.
        independent: That share where experts are chosen independently, ``[P, E, E]``.
    """

    labels: list[str]
    layers: np.ndarray
    sequence: np.ndarray
    degree: np.ndarray
    first: np.ndarray
    first_weight: np.ndarray
    entropy: np.ndarray
    load: np.ndarray
    max_violation: np.ndarray
    dead: np.ndarray
    compared: np.ndarray
    together: np.ndarray
    independent: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """Which experts there are and can be routed to, ``[L, E]``."""
        return np.isfinite(self.load)

    @property
    def served(self) -> np.ndarray:
        """Tokens with at least one expert, ``[L]``."""
        return (self.degree > 0).sum(axis=0)


def is_routed(record: RunRecord) -> bool:
    """Whether the record is that of a traced pass in which there was a choice between experts."""
    return has(record, *ROUTED) and record.records["routed_load"].shape[-1:] != (1,)


def is_compared(record: RunRecord) -> bool:
    """Whether a token of a traced pass has several experts, so that experts meet."""
    return is_routed(record) and bool((record.records["routed_degree"] > 1).any())


def routed(record: RunRecord) -> Routed:
    """Return the records of a trace.

    Raises:
        CheckpointError: One is missing or does not fit the others, or there is not one label a token.
    """
    values = [array(record, key, ndim=len(axes)) for key, axes in ROUTED.items()]
    sizes: dict[str, int] = {}
    for (key, axes), value in zip(ROUTED.items(), values, strict=True):
        expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, value.shape, strict=True)]
        if list(value.shape) != expected:
            what = f"'{key}' does not fit the other records"
            raise CheckpointError(what, record.path, expected, list(value.shape))
    found = Routed(_labels(record, sizes["N"]), *values)
    limits = {
        "routed_first": (found.first, -1, sizes["E"] - 1),
        "routed_degree": (found.degree, 0, sizes["E"]),
        "routed_graph_layer": (found.compared, 0, sizes["L"] - 1),
    }
    for key, (value, low, high) in limits.items():
        if value.min() < low or value.max() > high:
            got = [int(value.min()), int(value.max())]
            raise CheckpointError(f"'{key}' is out of range", record.path, f"{low} to {high}", got)
    return found


def tokens_of(found: Routed) -> str:
    """``214 tokens``, and of how many sequences if there are several."""
    sequences = len(np.unique(found.sequence))
    several = f" of {sequences} sequences" if sequences > 1 else ""
    return f"{len(found.labels):,} token{'s' * (len(found.labels) != 1)}{several}"


def panel_layers(found: Routed) -> list[str]:
    """Names of the layers."""
    return [str(layer) for layer in found.layers]


def _labels(record: RunRecord, count: int) -> list[str]:
    try:
        labels = json.loads(record.meta.get("tokens", "null"))
    except ValueError:
        labels = None
    if not isinstance(labels, list) or len(labels) != count or not all(isinstance(t, str) for t in labels):
        raise CheckpointError(
            "these are not the tokens of the trace", record.path, f"{count} texts in 'tokens'"
        )
    return labels
