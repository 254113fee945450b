"""What happens beside the update: ghosts, orthogonality, evaluation, checkpoints, progress."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphmoe import checkpoint
from graphmoe.nn import moe_layers
from graphmoe.train.logs import MetricsLog, RecordLog
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.optim import clear_moments, scale_updates


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
