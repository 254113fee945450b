"""What happens beside the update: ghosts, orthogonality, evaluation, checkpoints, progress."""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphmoe import checkpoint
from graphmoe.nn import MoELayer, moe_layers
from graphmoe.train.logs import MetricsLog, RecordLog
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.optim import (
    GhostPolicy,
    clear_moments,
    ghost_update_scale,
    require_ghost_rates,
    scale_updates,
)
from graphmoe.train.parallel import whole_parameters
from graphmoe.train.ranks import together
from graphmoe.typing import Record


class GhostActivation(Callback):
    """Moves the ghosts of every layer once a step, with figures of all ranks.

    Sleeping ghosts are frozen, waking ones learn at a rate of their own, see
    :func:`~graphmoe.train.optim.ghost_learning_rate`: pass :meth:`setup` to
    :func:`~graphmoe.train.loop.fit`.

    Args:
        model: Its MoE layers with ghosts are the ones that are moved.
        learning_rate: ``level``, ``inverse`` or ``complementary``.
        peak: Peak learning rate of the primary parameters; needed unless the policy is ``level``.
        ghost_peak: The ghosts' own rate, which ``level`` does not use. Default: ``peak``.

    Raises:
        ConfigError: See :func:`~graphmoe.train.optim.require_ghost_rates`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: GhostPolicy = "level",
        peak: float | None = None,
        ghost_peak: float | None = None,
    ):
        require_ghost_rates(learning_rate, peak, ghost_peak)
        ghost_peak = peak if ghost_peak is None else ghost_peak
        self.scale = partial(ghost_update_scale, learning_rate, peak=peak, ghost_peak=ghost_peak)
        self.layers = [(i, layer) for i, layer in enumerate(moe_layers(model)) if layer.ghosts is not None]
        self.rates: dict[int, Tensor] = {}

    def setup(self, optimizer: torch.optim.Optimizer) -> None:
        """Give ghosts their rates in every step of ``optimizer``, whose groups have one rate."""
        scale_updates(
            optimizer,
            {
                parameter: partial(self._scales, optimizer, index, layer)
                for index, layer in self.layers
                for parameter in layer.ghost_slices()
            },
        )

    def _scales(self, optimizer: torch.optim.Optimizer, index: int, layer: MoELayer) -> Tensor:
        """Scale of each expert's update, ``[E]``; keeps the rates that follow from it."""
        lr = optimizer.param_groups[0]["lr"]
        level = layer.ghosts()
        scale = self.scale(lr=lr, level=level[layer.num_experts :])
        self.rates[index] = lr * scale
        return torch.cat([level[: layer.num_experts], scale])

    def figures(self, state: TrainState, model: nn.Module) -> dict[str, Tensor]:
        """Learning rates of the ghosts in the step just done, ``ghost_learning_rate [L, G]``, by the
        levels they had in it; nothing without ghosts or before the first step."""
        return {"ghost_learning_rate": torch.stack(list(self.rates.values()))} if self.rates else {}

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        for index, layer in self.layers:
            mean, served, unexplained = _all_ranks(state, outputs.records[index])
            before = layer.ghosts.phase.clone()
            layer.ghosts.observe(mean, served, unexplained)
            woken = ((before == 0) & (layer.ghosts.phase != 0)).nonzero().flatten() + layer.num_experts
            if woken.numel():  # a waking ghost starts with fresh optimiser state
                for parameter in layer.ghost_slices():
                    clear_moments(state.optimizer, parameter, woken)


def _all_ranks(state: TrainState, record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """Mean output ``[E, D]``, rows ``[E]`` and unexplained variance of the global batch, equal on all ranks.

    Ranks count by their edges: a token that is not masked has as many as any other. The variance of all
    tokens is the mean square less the square of the mean, so that it holds the part between ranks, too.
    """
    mean, served, unexplained = record.expert_mean.detach(), record.routing.ptr.diff(), record.unexplained
    if state.accelerator.num_processes == 1:
        return mean, served, unexplained
    rows, centre = served.double(), record.residual_mean.double()  # [E], [D]
    square = unexplained + centre.square().mean()
    parts = (mean * rows.unsqueeze(1), rows, centre * rows.sum(), square.view(1) * rows.sum())
    sums = state.accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
    total, rows, centre, square = sums.split([part.numel() for part in parts])
    edges = rows.sum().clamp(min=1)
    mean = total.view_as(mean) / rows.unsqueeze(1).clamp(min=1)
    return mean, rows.to(served.dtype), square.squeeze(0) / edges - (centre / edges).square().mean()


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
    """Writes a checkpoint and, before it, the records so far: on the main rank, while the others wait."""

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
        writes = state.accelerator.is_main_process
        whole = checkpoint.whole_state(model, state.optimizer, keep=writes)
        with together(state.accelerator):
            if writes:
                if self.records is not None:
                    self.records.write(state, model)
                facts = {"step": state.step, "max_steps": state.max_steps, **self.facts}
                checkpoint.save(
                    state.run_dir, state.step, model=model, optimizer=state.optimizer, state=facts,
                    extras=self.extras, keep=self.keep, whole=whole,
                )  # fmt: skip


class Unsharded(Callback):
    """Passes every step on to a callback, which finds the parameters of a sharded model whole.

    They then take the memory of the whole model in every process.
    """

    def __init__(self, callback: Callback):
        self.callback = callback

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self.callback.on_start(state, model)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        with whole_parameters(model):
            self.callback.on_step(state, model, outputs)

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        self.callback.on_end(state, model)


class Progress(Callback):
    """A progress bar on a terminal, plain lines with the time left elsewhere.

    Args:
        every: Steps between lines.
        pause: Seconds between lines, at least; first and last step have theirs in any case.
        evaluation: What is scored meanwhile; its latest figures are shown.
        stream: Where to; standard error by default.
        unit: What a label of a batch is, for the speed.
    """

    def __init__(
        self,
        *,
        every: int = 20,
        pause: float = 2.0,
        evaluation: Evaluate | None = None,
        stream=None,
        unit: str = "token",
    ):
        self.every, self.pause, self.evaluation = every, pause, evaluation
        self.stream, self.unit = stream or sys.stderr, unit
        self.bar: tqdm | None = None

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self.began, self.first = time.perf_counter(), state.step
        self.spoken = self.began
        self.quiet = not state.accelerator.is_main_process
        if not self.quiet and self.stream.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.step, unit="step", file=self.stream, leave=True
            )

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        figures = {"loss": f"{state.metrics['loss']:.3f}"}
        if self.evaluation is not None and self.evaluation.latest.get("bits_per_byte") is not None:
            figures["held-out bits/byte"] = f"{self.evaluation.latest['bits_per_byte']:.3f}"
        if self.evaluation is not None and self.evaluation.latest.get("accuracy") is not None:
            figures["validation accuracy"] = f"{self.evaluation.latest['accuracy']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update()
        elif not self.quiet and self._is_time(state):
            self.spoken = time.perf_counter()
            passed = self.spoken - self.began
            left = passed / (state.step - self.first) * (state.max_steps - state.step)
            text = ", ".join(f"{name} {value}" for name, value in figures.items())
            speed = state.metrics["tokens"] * (state.step - self.first) / passed
            print(
                f"step {state.step}/{state.max_steps}: {text}, {speed:,.0f} {self.unit}s/s, {passed:.0f} s "
                f"passed, about {left:.0f} s left", file=self.stream, flush=True,
            )  # fmt: skip

    def _is_time(self, state: TrainState) -> bool:
        if state.last or state.step == self.first + 1:
            return True
        return state.step % self.every == 0 and time.perf_counter() - self.spoken >= self.pause

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        if self.bar is not None:
            self.bar.close()
