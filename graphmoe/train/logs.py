"""What a run keeps of itself: lines of metrics, and records of its experts over time."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.loss import gram
from graphmoe.metrics import (
    RouterCounts,
    count_routes,
    random_drop_rate,
    random_max_violation,
    router_metrics,
    specialisation,
)
from graphmoe.nn import HyperCoupleConv, MoELayer, moe_layers
from graphmoe.train.collaboration import gate_spread, gate_sums
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.ranks import sum_of_ranks
from graphmoe.typing import NEVER, Record

RECENT_STEPS = 100
"""Optimiser steps that a mean over the end of a run takes in."""


class RecordLog(Callback):
    """Keeps routing, couplings, collaboration, specialisation, orthogonality and ghosts over time.

    One row of every series is added at each call; :meth:`write` puts them all into
    ``records.safetensors``. Load, edges, entropy, dropped edges and gates are those of the last micro-batch
    of all ranks; specialisation and overlap those of each rank's share.

    Args:
        metadata: Facts of the run, written beside the series.
        extras: ``(state, model) -> figures``: called at each row, which their figures join, such as
            ``{"ghost_learning_rate": [L, G]}``. Names and shapes must be the same every time.
    """

    def __init__(
        self,
        metadata: Mapping[str, object],
        *,
        extras: Sequence[Callable[[TrainState, nn.Module], dict[str, Tensor]]] = (),
    ):
        self.metadata = {key: str(value) for key, value in metadata.items()}
        self.extras = tuple(extras)
        self.series: dict[str, list[Tensor]] = {}

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if state.step == 0 or not (state.run_dir / "records.safetensors").exists():
            return
        old = {k: torch.from_numpy(v) for k, v in checkpoint.read(state.run_dir).records.items()}
        if "step" not in old:  # nothing but final arrays
            return
        keep = int((old["step"] <= state.step).sum())
        self.series = {k: list(v[:keep]) for k, v in old.items() if not _is_static(k)}

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        layers = moe_layers(model)
        row = {"step": torch.tensor(state.step)}
        with torch.no_grad():
            if layers:
                row |= self._mixture(state, model, outputs, layers)
            for figures in self.extras:
                row |= figures(state, model)
        if len(row) == 1:
            return
        for key, value in row.items():
            dtype = torch.float32 if value.is_floating_point() else torch.int64
            self.series.setdefault(key, []).append(value.detach().to("cpu", dtype, copy=True))

    def _mixture(
        self, state: TrainState, model: nn.Module, outputs: object, layers: list[MoELayer]
    ) -> dict[str, Tensor]:
        row = _traffic(state, outputs.records)
        if all(record.overflow is not None for record in outputs.records):
            row["drop_rate_random"] = _random_drop_rates(layers, outputs.records)
        row |= self._outputs(model, outputs)
        row |= self._couplings(layers)
        if layers[0].ghosts is not None:
            row["saturation"] = torch.stack([layer.ghosts.saturation() for layer in layers])
            row["ghost_level"] = torch.stack([layer.ghosts()[-layer.num_ghosts :] for layer in layers])
            row["ghost_phase"] = torch.stack([layer.ghosts.phase for layer in layers])
        return row

    def _outputs(self, model: nn.Module, outputs: object) -> dict[str, Tensor]:
        row = {}
        if all(r.expert_mean is not None for r in outputs.records):
            # A dormant ghost has no edges, so whoever serves is live.
            rows = [(r.expert_mean, r.routing.ptr.diff() > 0) for r in outputs.records]
            row["overlap"] = torch.stack([_overlap(mean, served) for mean, served in rows])
            row["specialisation"] = torch.stack([specialisation(mean, served) for mean, served in rows])
        coefficient = _orthogonality_coefficient(model)
        if coefficient:
            row["orthogonality_strength"] = model.orthogonality_strength * coefficient
        return row

    def _couplings(self, layers: list[MoELayer]) -> dict[str, Tensor]:
        connections = [layer.connections() for layer in layers]
        if any(c is None for c in connections):
            return {}
        row = {"coupling": torch.stack(connections)}
        first = [layer.couplers[0] for layer in layers]
        if all(isinstance(c, HyperCoupleConv) and c.weight is not None for c in first):
            row["hyperedge_weight"] = torch.stack([c.hyperedge_weight() for c in first])
        return row

    def summary(self) -> dict[str, list[float]]:
        """What only training shows, as one number a layer, for JSON, means over rows.

        Of the last 100 steps: ``step_max_violation``, the MaxVio of single steps, beside ``.._random``, the
        sampling floor, and ``edges_per_token``, if it varies. Of the last quarter of the rows, if there is a
        capacity: ``drop_rate`` beside its chance level ``drop_rate_random``. Empty without a row.
        """
        names = [name for name in ("drop_rate", "drop_rate_random") if self.series.get(name)]
        rows = {name: torch.stack(self.series[name]) for name in names}  # [S, L]
        figures = {name: value[-max(1, len(value) // 4) :].mean(0).tolist() for name, value in rows.items()}
        if self.series:
            steps = torch.stack(self.series["step"])
            recent = steps > steps[-1] - RECENT_STEPS
            for name in ("step_max_violation", "step_max_violation_random", "edges_per_token"):
                # A run that an older version began has rows without them.
                if len(self.series.get(name, ())) == len(steps):
                    rows = torch.stack(self.series[name])[recent]
                    if name != "edges_per_token" or rows.min() < rows.max():
                        figures[name] = rows.mean(0).tolist()
        return figures

    def write(
        self, state: TrainState, model: nn.Module, *, final: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what is recorded so far, on the main rank; nothing without a row and ``final`` arrays.

        Args:
            final: Arrays ``final_...`` without an axis of steps, such as those of
                :func:`~graphmoe.train.evaluate.probe_experts`, to be written beside the series. They
                describe the model as it is now: the next call without them leaves them out.

        Raises:
            ConfigError: An array that is not named ``final_...`` would be resumed as a series.
        """
        final = dict(final or {})
        for name in final:
            if not name.startswith("final_"):
                raise ConfigError("array without steps has the name of a series", "final", "final_...", name)
        if not (self.series or final) or not state.accelerator.is_main_process:
            return
        tensors = {key: torch.stack(rows) for key, rows in self.series.items()} | final
        for layer in moe_layers(model)[:1]:
            if layer.couplers and isinstance(layer.couplers[0], HyperCoupleConv):
                tensors["incidence"] = layer.couplers[0].hyperedge_index.cpu()
        checkpoint.write_records(state.run_dir / "records.safetensors", tensors, self.metadata)


def _traffic(state: TrainState, records: Sequence[Record]) -> dict[str, Tensor]:
    """What can be counted, of all ranks: ``load [L, E]``; ``step_max_violation``, what blind choice would
    give in its place, ``routing_entropy`` and ``edges_per_token``, each ``[L]``; with a capacity ``drop_rate
    [L]``; with a mediator the mean and the standard deviation of its gate, ``[L]``. All ranks must call
    this."""
    routes = [count_routes(record.routing, record.mask, record.overflow) for record in records]
    counts = {name: torch.stack(parts) for name, *parts in zip(RouterCounts._fields, *routes, strict=True)}
    if all(record.gate is not None for record in records):
        counts["gate"] = torch.stack([gate_sums(record) for record in records])  # [L, 3]
    counts = sum_of_ranks(state.accelerator, counts)
    gate = counts.pop("gate", None)
    figures = [router_metrics(RouterCounts(*parts)) for parts in zip(*counts.values(), strict=True)]
    names = {"load": "load", "max_violation": "step_max_violation"}
    names |= {name: name for name in ("routing_entropy", "edges_per_token")}
    if all(record.overflow is not None for record in records):
        names["drop_rate"] = "drop_rate"
    row = {name: torch.stack([figure[key] for figure in figures]) for key, name in names.items()}
    floors = [_random_max_violation(RouterCounts(*parts)) for parts in zip(*counts.values(), strict=True)]
    row["step_max_violation_random"] = torch.tensor(floors)
    if gate is not None:
        row["mediator_gate"], row["mediator_gate_std"] = gate_spread(gate)
    return row


def _random_max_violation(counts: RouterCounts) -> float:
    tokens, live = max(1, int(counts.tokens)), max(1, int((counts.reachable > 0).sum()))
    k = round(int(counts.served.sum()) / tokens)
    return random_max_violation(tokens, live, min(max(1, k), live))


def _random_drop_rates(layers: Sequence[MoELayer], records: Sequence[Record]) -> Tensor:
    """Drop rate of a router that chooses blindly among live experts, on this rank's share, ``[L]``."""
    rates = []
    for layer, record in zip(layers, records, strict=True):
        routing = record.routing
        edges = int(routing.ptr[-1] + record.dropped)
        live = int((routing.logits > NEVER / 2).any(dim=0).sum())
        k = max(1, min(routing.k, live))
        rates.append(random_drop_rate(max(1, edges // k), max(1, live), k, layer.capacity_factor))
    return torch.tensor(rates)


def _is_static(name: str) -> bool:
    """Whether an array of the records has no axis of steps."""
    return name == "incidence" or name.startswith("final_")


def _orthogonality_coefficient(model: nn.Module) -> float:
    """Coefficient of the orthogonality of outputs or, if that is 0, of weights; 0 without either."""
    config = getattr(model, "config", None)
    names = ("orthogonality_output_coef", "orthogonality_weight_coef")
    return next((value for name in names if (value := getattr(config, name, 0))), 0)


def _overlap(mean: Tensor, served: Tensor) -> Tensor:
    """Mean squared off-diagonal cosine of mean outputs minus their mean over the serving experts."""
    rows = mean[served]
    if len(rows) < 2:
        return mean.new_zeros(())
    square = gram(rows - rows.mean(dim=0), eps=1e-12).square()
    return (square.sum() - square.diagonal().sum()) / (len(rows) * (len(rows) - 1))


class MetricsLog(Callback):
    """Appends lines to ``metrics.jsonl``.

    Args:
        run_dir: Folder of the run.
        dtype: Precision to note in each line.
        unit: What a label of a batch is: the speed is called ``tokens_per_second``.
    """

    def __init__(self, run_dir: Path, *, dtype: str = "fp32", unit: str = "token"):
        self.path, self.dtype, self.unit = Path(run_dir) / "metrics.jsonl", dtype, unit
        self._since = (0, 0.0)

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if state.accelerator.is_main_process:
            checkpoint.truncate_metrics(self.path.parent, state.step)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        tokens, seconds = state.tokens - self._since[0], state.seconds - self._since[1]
        self._since = (state.tokens, state.seconds)
        keys = ("loss", "lm_loss", "aux", "lr", "grad_norm", "seconds")
        line = {"kind": "train", "step": state.step, **{k: state.metrics[k] for k in keys}}
        speed = {f"{self.unit}s_per_second": tokens / max(seconds, 1e-9)}
        self.write(state, {**line, **speed, "dtype": self.dtype})

    def write(self, state: TrainState, line: dict) -> None:
        """Append one line on the main rank."""
        if state.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
