"""Checked access to the time series of a run: every plot reads its numbers through here.

Shapes: S recorded steps, L MoE layers, E experts (primaries first, then G ghosts), H hyperedges, N nodes that
collaborate (experts and maybe a mediator), P and Q numbers of reasoning steps and of rounds that were tried.
"""

import math

import numpy as np

from graphmoe.checkpoint import RunRecord
from graphmoe.errors import CheckpointError

DORMANT, ACTIVATING, ACTIVE = 0, 1, 2
AXES = {
    "load": "SLE",
    "coupling": "SLEE",
    "hyperedge_weight": "SLH",
    "saturation": "SL",
    "ghost_level": "SLG",
    "ghost_phase": "SLG",
    "ghost_learning_rate": "SLG",
    "orthogonality_strength": "SL",
    "overlap": "SL",
    "specialisation": "SL",
    "routing_entropy": "SL",
    "drop_rate": "SL",
    "drop_rate_random": "SL",
    "mediator_gate": "SL",
    "mediator_gate_std": "SL",
    "sparse_density": "SL",
    "sparse_edges": "SL",
    "sparse_survival": "SL",
}
"""Axes of every time series."""
FINAL = {
    "cka": "LEE",
    "cka_random": "L",
    "specialisation": "L",
    "specialisation_random": "L",
    "routing_entropy": "L",
    "routing_entropy_random": "L",
    "mutual_information": "L",
    "mutual_information_random": "L",
    "coactivation": "LEE",
    "coactivation_random": "LEE",
    "attention": "LNN",
    "attention_uniform": "L",
    "mediator_gate": "L",
    "mediator_gate_std": "L",
    "inference_loss": "PQ",
    "inference_error": "PQ",
    "inference_steps": "P",
    "inference_rounds": "Q",
    "inference_trained": "2",
}
"""Axes of what was measured once, on held-out text after training; recorded as ``final_<name>``."""
INFERENCE = ("final_inference_steps", "final_inference_rounds", "final_inference_trained")
ROUTED = {
    "routed_layer": "L",
    "routed_sequence": "N",
    "routed_degree": "NL",
    "routed_first": "NL",
    "routed_first_weight": "NL",
    "routed_entropy": "NL",
    "routed_load": "LE",
    "routed_max_violation_random": "L",
    "routed_dead_random": "L",
    "routed_graph_layer": "P",
    "routed_coactivation": "PEE",
    "routed_coactivation_random": "PEE",
}
"""Axes of what one traced pass has shown: N tokens, P layers whose experts are compared pair by pair."""
COUNTS = (
    *("step", "ghost_phase", "incidence", "sparse_edges", *INFERENCE),
    *("routed_layer", "routed_sequence", "routed_degree", "routed_first", "routed_graph_layer"),
)
"""What is recorded in integers."""


def steps(record: RunRecord) -> np.ndarray:
    """Return the recorded optimiser steps, ``[S]`` int64."""
    return array(record, "step", ndim=1)


def has(record: RunRecord, *keys: str) -> bool:
    """Whether the run has recorded all of ``keys``, with at least one value each."""
    return all(key in record.records and record.records[key].size for key in keys)


def array(record: RunRecord, key: str, *, ndim: int) -> np.ndarray:
    """Return the recorded array ``key``, of integers if it is one of :data:`COUNTS`, else of floats.

    Raises:
        CheckpointError: If it is missing, empty or of another type or number of axes.
    """
    values, kind = record.records.get(key), "integers" if key in COUNTS else "floats"
    if values is None or values.ndim != ndim or values.dtype.kind != kind[0] or not values.size:
        got = None if values is None else f"{values.dtype} {list(values.shape)}"
        raise CheckpointError(f"'{key}' cannot be drawn", _where(record), f"{kind} on {ndim} axes", got)
    return values


def series(record: RunRecord, key: str) -> np.ndarray:
    """Return the time series ``key`` with the axes that :data:`AXES` gives it.

    Raises:
        CheckpointError: If it is missing, empty or does not fit the other records.
    """
    axes = AXES[key]
    values = array(record, key, ndim=len(axes))
    sizes = dict(zip(axes, values.shape, strict=True))
    ghosts = num_ghosts(record)
    fits = (
        values.shape == tuple(sizes[axis] for axis in axes)
        and sizes["S"] == len(steps(record))
        and ("E" not in sizes or sizes["E"] == num_experts(record))
        and sizes.get("G", ghosts) == ghosts
        and all(other.shape[1:2] == values.shape[1:2] for other in _layered(record))
    )
    if not fits:
        experts = f"E = {num_experts(record)}, " if "E" in sizes else ""
        known = f"S = {len(steps(record))}, {experts}G = {ghosts}, the same L everywhere"
        what = f"'{key}' does not fit the other records"
        raise CheckpointError(what, _where(record), f"[{', '.join(axes)}] with {known}", values.shape)
    # A run that diverged has recorded infinities, which no axis can show.
    return np.where(np.isfinite(values), values, np.nan) if values.dtype.kind == "f" else values


def final(record: RunRecord, name: str) -> np.ndarray:
    """Return what was measured at the end of the run, with the axes that :data:`FINAL` gives it.

    Args:
        record: The run.
        name: The figure, without the ``final_`` of its record.

    Raises:
        CheckpointError: If it is missing, empty or does not fit the other records.
    """
    key, axes = f"final_{name}", FINAL[name]
    values, sizes = array(record, key, ndim=len(axes)), _final_sizes(record)
    fits = all(size in sizes[axis] for axis, size in zip(axes, values.shape, strict=True))
    if not fits or (axes == "LNN" and values.shape[1] != values.shape[2]):
        expected = [" or ".join(str(size) for size in sizes[axis]) for axis in axes]
        what = f"'{key}' does not fit the other records"
        raise CheckpointError(what, _where(record), f"[{', '.join(expected)}]", list(values.shape))
    return np.where(np.isfinite(values), values, np.nan) if values.dtype.kind == "f" else values


def num_ghosts(record: RunRecord) -> int:
    """Return the number of ghost experts (0 without ghosts)."""
    return _count(record, "num_ghosts")


def num_experts(record: RunRecord) -> int:
    """Return the number of experts E, primaries and ghosts."""
    return _count(record, "num_experts", least=1) + num_ghosts(record)


def number(record: RunRecord, key: str) -> float | None:
    """Return the metadata entry ``key`` as a finite number, or ``None`` if it is not one."""
    try:
        value = float(record.meta[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def expert_names(record: RunRecord) -> list[str]:
    """Return the names of the experts: ``0 1 2 ...`` and then ``g0 g1 ...``."""
    ghosts = num_ghosts(record)
    primaries = num_experts(record) - ghosts
    return [str(index) for index in range(primaries)] + [f"g{index}" for index in range(ghosts)]


def phases(record: RunRecord) -> np.ndarray:
    """Return the phase of each ghost, ``[S, L, G]``; derived from the levels if it was not recorded."""
    if "ghost_phase" in record.records:
        return series(record, "ghost_phase")
    level = series(record, "ghost_level")
    return np.where(level <= 0, DORMANT, np.where(level < 1, ACTIVATING, ACTIVE))


def live(record: RunRecord, num_layers: int) -> np.ndarray:
    """Return which experts can be routed to: ``[S, L, E]`` bool, false for a dormant ghost."""
    ghosts, experts = num_ghosts(record), num_experts(record)
    alive = np.ones((len(steps(record)), num_layers, experts), dtype=bool)
    if not ghosts or not {"ghost_phase", "ghost_level"} & record.records.keys():
        return alive
    phase = phases(record)
    alive[:, :, experts - ghosts :] = phase != DORMANT
    return alive


def settled(record: RunRecord) -> np.ndarray:
    """Return the first record from which on no ghost's level changes any more, ``[L]``; 0 without ghosts."""
    if has(record, "ghost_level"):
        level = series(record, "ghost_level")
    elif has(record, "ghost_phase"):
        level = series(record, "ghost_phase")
    else:
        return np.zeros(series(record, "coupling").shape[1], dtype=int)
    moving = (level != level[-1]).any(axis=2)  # [S, L]
    last = len(moving) - 1 - moving[::-1].argmax(axis=0)
    return np.where(moving.any(axis=0), last + 1, 0)


def metric(record: RunRecord, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of one entry of ``metrics.jsonl``, sorted by step.

    Where a step was logged twice, the last line of it counts; values that are not finite are left out.

    Args:
        record: The run.
        kind: ``"train"`` or ``"eval"``.
        key: Name of the entry; ``"aux/balance"`` reaches into a nested entry.

    Returns:
        Two float arrays of equal length, empty if the run has no such entry.
    """
    values: dict[int, float] = {}
    for entry in record.metrics:
        value = _lookup(entry, key)
        if entry.get("kind") == kind and is_number(value) and is_number(entry.get("step")):
            values[int(entry["step"])] = float(value)
    at = sorted(values)
    return np.array(at, dtype=float), np.array([values[step] for step in at], dtype=float)


def _count(record: RunRecord, key: str, *, least: int = 0) -> int:
    text = record.meta.get(key, "0")
    if not (text.isdecimal() and len(text) < 7 and int(text) >= least):
        raise CheckpointError("not a count", f"{_where(record)}: {key}", f"a number from {least} on", text)
    return int(text)


def _layered(record: RunRecord) -> list[np.ndarray]:
    return [record.records[key] for key in AXES if key in record.records]


def _num_layers(record: RunRecord) -> int | None:
    """Number of MoE layers L, as the time series have it, or else what was measured at the end."""
    counts = [other.shape[1] for other in _layered(record) if other.ndim > 1]
    keys = [f"final_{name}" for name, axes in FINAL.items() if axes[0] == "L"]
    ends = [record.records[key] for key in keys if key in record.records]
    return next(iter([*counts, *(end.shape[0] for end in ends if end.ndim)]), None)


def _final_sizes(record: RunRecord) -> dict[str, tuple[int | None, ...]]:
    """The lengths that each axis of :data:`FINAL` may have."""
    tried = [record.records.get(key, np.empty(0)).size for key in INFERENCE[:2]]
    experts = num_experts(record)
    sizes = {"L": (_num_layers(record),), "E": (experts,), "N": (experts, experts + 1), "2": (2,)}
    return sizes | {axis: (size,) for axis, size in zip("PQ", tried, strict=True)}


def _lookup(entry: dict, key: str) -> object:
    value: object = entry
    for part in key.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that can be drawn (``true``, ``NaN`` and ``10**999`` cannot)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _where(record: RunRecord) -> str:
    return str(record.path / "records.safetensors")
