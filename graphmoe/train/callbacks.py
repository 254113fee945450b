"""What happens beside the update: ghosts, orthogonality, evaluation, records, logs, checkpoints."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphmoe import checkpoint
from graphmoe.loss import gram, load
from graphmoe.nn import HyperCoupleConv, MoELayer
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.optim import clear_moments, scale_updates


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order of its modules."""
    return [m for m in model.modules() if isinstance(m, MoELayer)]


class GhostActivation(Callback):
    """Moves the ghosts of every layer once a step, with figures of all ranks.

    Sleeping ghosts are frozen, waking ones learn at a rate proportional to their level: pass
    :meth:`setup` to :func:`~graphmoe.train.loop.fit`.
    """

    def __init__(self, model: nn.Module):
        self.layers = [(i, layer) for i, layer in enumerate(moe_layers(model)) if layer.ghosts is not None]

    def setup(self, optimizer: torch.optim.Optimizer) -> None:
        scale_updates(
            optimizer, {p: layer.ghosts for _, layer in self.layers for p in layer.ghost_slices()}
        )  # fmt: skip

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        for index, layer in self.layers:
            record = outputs.records[index]
            served = record.routing.ptr.diff()
            mean, served, unexplained = _all_ranks(
                state, record.expert_mean.detach(), served, record.unexplained
            )
            before = layer.ghosts.phase.clone()
            layer.ghosts.observe(mean, served, unexplained)
            woken = ((before == 0) & (layer.ghosts.phase != 0)).nonzero().flatten() + layer.num_experts
            if woken.numel():  # a waking ghost starts with fresh optimiser state
                for parameter in layer.ghost_slices():
                    clear_moments(state.optimizer, parameter, woken)


def _all_ranks(
    state: TrainState, mean: Tensor, served: Tensor, unexplained: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Figures of the global batch: means weighted by the rows behind them."""
    if state.accelerator.num_processes == 1:
        return mean, served, unexplained
    total = state.accelerator.reduce(mean * served.unsqueeze(1), "sum")
    served = state.accelerator.reduce(served, "sum")
    return total / served.unsqueeze(1).clamp(min=1), served, state.accelerator.reduce(unexplained, "mean")


class OrthogonalityWarmup(Callback):
    """Raises the strength of the orthogonality losses linearly from 0 to 1 over ``steps`` steps.

    The strength is computed from the step each time, never from its last value.
    """

    def __init__(self, steps: int):
        self.steps = max(steps, 1)

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        model.orthogonality_strength.fill_(min(1.0, state.step / self.steps))

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        self.on_start(state, model)


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


class Evaluate(Callback):
    """Scores the model in eval mode and logs a line of kind ``eval``."""

    def __init__(self, evaluate: Callable[[nn.Module], dict[str, float | None]], log: MetricsLog):
        self.evaluate, self.log = evaluate, log
        self.latest: dict[str, float | None] = {}

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        training = model.training
        model.eval()
        with torch.no_grad():
            self.latest = self.evaluate(model)
        model.train(training)
        self.log.write(state, {"kind": "eval", "step": state.step, **self.latest})


class Save(Callback):
    """Writes a checkpoint and, before it, the records so far."""

    def __init__(
        self,
        *,
        records: RecordLog | None = None,
        extras: tuple[Callable[[Path], None], ...] = (),
        keep: int = 2,
        facts: Mapping | None = None,
    ):
        self.records, self.extras, self.keep, self.facts = records, extras, keep, dict(facts or {})

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if state.accelerator.is_main_process:
            if self.records is not None:
                self.records.write(state, model)
            facts = {"step": state.step, "max_steps": state.max_steps, **self.facts}
            checkpoint.save(
                state.run_dir, state.step, model=model, optimizer=state.optimizer, state=facts,
                extras=self.extras, keep=self.keep,
            )  # fmt: skip
        state.accelerator.wait_for_everyone()


class Progress(Callback):
    """A progress bar on a terminal, plain lines with the time left elsewhere."""

    def __init__(self, *, every: int = 20, evaluation: Evaluate | None = None, stream=None):
        self.every, self.evaluation, self.stream = every, evaluation, stream or sys.stderr
        self.bar: tqdm | None = None

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self.began, self.first = time.perf_counter(), state.step
        self.quiet = not state.accelerator.is_main_process
        if not self.quiet and self.stream.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.step, unit="step", file=self.stream, leave=True
            )

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        figures = {"loss": f"{state.metrics['loss']:.3f}"}
        if self.evaluation is not None and self.evaluation.latest.get("bits_per_byte") is not None:
            figures["held-out bits/byte"] = f"{self.evaluation.latest['bits_per_byte']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update()
        elif not self.quiet and (state.step % self.every == 0 or state.last or state.step == self.first + 1):
            passed = time.perf_counter() - self.began
            left = passed / (state.step - self.first) * (state.max_steps - state.step)
            text = ", ".join(f"{name} {value}" for name, value in figures.items())
            speed = state.metrics["tokens"] * (state.step - self.first) / passed
            print(
                f"step {state.step}/{state.max_steps}: {text}, {speed:,.0f} tokens/s, {passed:.0f} s passed, "
                f"about {left:.0f} s left", file=self.stream, flush=True,
            )  # fmt: skip

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        if self.bar is not None:
            self.bar.close()
