"""What a run keeps of itself: lines of metrics, and records of its experts over time."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graphmoe import checkpoint
from graphmoe.loss import gram, load
from graphmoe.nn import HyperCoupleConv, MoELayer, moe_layers
from graphmoe.train.loop import Callback, TrainState


class RecordLog(Callback):
    """Keeps routing load, couplings, overlap, saturation and ghost levels over time.

    One row of every series is added at each call; :meth:`write` puts them all into
    ``records.safetensors``.
    """

    def __init__(self, metadata: Mapping[str, object]):
        self.metadata = {key: str(value) for key, value in metadata.items()}
        self.series: dict[str, list[Tensor]] = {}

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if state.step == 0 or not (state.run_dir / "records.safetensors").exists():
            return
        old = {k: torch.from_numpy(v) for k, v in checkpoint.read(state.run_dir).records.items()}
        keep = int((old["step"] <= state.step).sum())
        self.series = {k: list(v[:keep]) for k, v in old.items() if k != "incidence"}

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        layers = moe_layers(model)
        if not layers:
            return
        with torch.no_grad():
            row = {
                "step": torch.tensor(state.step),
                "load": torch.stack([load(r.routing) for r in outputs.records]),
            }
            row |= self._outputs(model, outputs)
            row |= self._couplings(layers)
            if layers[0].ghosts is not None:
                row["saturation"] = torch.stack([layer.ghosts.saturation() for layer in layers])
                row["ghost_level"] = torch.stack([layer.ghosts()[-layer.num_ghosts :] for layer in layers])
                row["ghost_phase"] = torch.stack([layer.ghosts.phase for layer in layers])
        for key, value in row.items():
            dtype = torch.float32 if value.is_floating_point() else torch.int64
            self.series.setdefault(key, []).append(value.detach().to("cpu", dtype, copy=True))

    def _outputs(self, model: nn.Module, outputs: object) -> dict[str, Tensor]:
        means = [r.expert_mean for r in outputs.records]
        row = {}
        if all(m is not None for m in means):
            row["overlap"] = torch.stack(
                [_overlap(m, r.routing.ptr.diff() > 0) for m, r in zip(means, outputs.records, strict=True)]
            )
        if getattr(model, "orthogonality_strength", None) is not None:
            row["orthogonality_strength"] = model.orthogonality_strength
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

    def write(self, state: TrainState, model: nn.Module) -> None:
        if not self.series:
            return
        tensors = {key: torch.stack(rows) for key, rows in self.series.items()}
        for layer in moe_layers(model)[:1]:
            if layer.couplers and isinstance(layer.couplers[0], HyperCoupleConv):
                tensors["incidence"] = layer.couplers[0].hyperedge_index.cpu()
        checkpoint.write_records(state.run_dir / "records.safetensors", tensors, self.metadata)


def _overlap(mean: Tensor, served: Tensor) -> Tensor:
    """Mean squared off-diagonal cosine of mean outputs minus their mean over the serving experts."""
    rows = mean[served]
    if len(rows) < 2:
        return mean.new_zeros(())
    square = gram(rows - rows.mean(dim=0), eps=1e-12).square()
    return (square.sum() - square.diagonal().sum()) / (len(rows) * (len(rows) - 1))


class MetricsLog(Callback):
    """Appends lines to ``metrics.jsonl``."""

    def __init__(self, run_dir: Path, *, dtype: str = "fp32"):
        self.path, self.dtype = Path(run_dir) / "metrics.jsonl", dtype
        self._since = (0, 0.0)

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if state.accelerator.is_main_process:
            checkpoint.truncate_metrics(self.path.parent, state.step)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        tokens, seconds = state.tokens - self._since[0], state.seconds - self._since[1]
        self._since = (state.tokens, state.seconds)
        keys = ("loss", "lm_loss", "aux", "lr", "grad_norm", "seconds")
        line = {"kind": "train", "step": state.step, **{k: state.metrics[k] for k in keys}}
        self.write(state, {**line, "tokens_per_second": tokens / max(seconds, 1e-9), "dtype": self.dtype})

    def write(self, state: TrainState, line: dict) -> None:
        """Append one line on the main rank."""
        if state.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
