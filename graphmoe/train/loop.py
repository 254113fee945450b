"""The one training loop, on accelerate. What happens beside the update is a callback."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe import checkpoint
from graphmoe.checkpoint.shards import whole
from graphmoe.errors import GraphMoEError
from graphmoe.train.config import RunConfig, Stopped
from graphmoe.train.optim import adamw, sgd
from graphmoe.train.parallel import compiled, gradient_norm, parallelize
from graphmoe.train.ranks import any_rank, make_accelerator, mean_of_ranks
from graphmoe.train.schedule import lr_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, object]


class NonFiniteError(GraphMoEError):
    """A loss or gradient that is not finite; the weights are those of the step before."""


@dataclass
class TrainState:
    """What callbacks may read, and ``stop`` to end training after this step.

    Attributes:
        step: Optimiser steps done. ``on_start`` may set it: data and learning rates begin there.
        max_steps: Steps to do.
        metrics: Figures of the last step, of all ranks: ``loss``, ``lm_loss``, ``aux``, ``lr``,
            ``grad_norm``, ``tokens`` of the step, ``seconds`` since the start, evaluation excluded.
        tokens: Tokens trained on by all ranks since this process started.
        seconds: Seconds spent on them.
        asked: Signal that arrived in this process, or 0.
        stop: Signal that arrived in any process, or 0, from the end of the step on, so that all
            callbacks of a step see one answer and all ranks stop after the same step.
    """

    step: int
    max_steps: int
    run_dir: Path
    optimizer: torch.optim.Optimizer
    accelerator: object
    metrics: dict = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    asked: int = 0
    stop: int = 0

    @property
    def last(self) -> bool:
        """Whether this step is the last one of this process."""
        return self.step >= self.max_steps or bool(self.stop)


class Callback:
    """Hooks of the loop, called on every rank; a subclass overrides what it needs."""

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        """Before the first step, after a resumed checkpoint is loaded."""

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        """After each optimiser step; ``outputs`` are those of its last micro-batch."""

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        """Once, also after an error or a stop."""


class Every(Callback):
    """Pass every ``n``-th step on to a callback, and the last one if ``last``."""

    def __init__(self, n: int, callback: Callback, *, last: bool = True):
        self.n, self.callback, self.last = n, callback, last

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self.callback.on_start(state, model)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if state.step % self.n == 0 or (self.last and state.last):
            self.callback.on_step(state, model, outputs)

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        self.callback.on_end(state, model)


def reseed(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch as a function of (seed, step, rank), so that no generator state need be saved."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        # The same numbers; torch.manual_seed would write a stack trace for every device that is not there.
        torch.default_generator.manual_seed(number)


def fit(
    model: nn.Module,
    batches: Callable[[int, int, slice], Batch],
    config: RunConfig,
    run_dir: Path,
    *,
    callbacks: Sequence[Callback] = (),
    setup: Callable[[torch.optim.Optimizer], None] | None = None,
    resume_from: Path | None = None,
    accelerator: "Accelerator | None" = None,
) -> TrainState:
    """Train ``model`` for ``config.max_steps`` optimiser steps.

    In several processes every one of them calls this with the same arguments, and each trains on its share
    of every batch; the steps are those of one process on the whole batch. With ``parallel: fsdp`` the
    parameters of ``model`` are slices afterwards, which :mod:`graphmoe.checkpoint` can write and read.

    Args:
        model: Returns an output with ``loss`` when called with a batch; equal in all processes.
        batches: ``(index, size, slots) -> batch``: the rows ``slots`` of global batch ``index`` of
            ``size`` rows, a pure function of its arguments. Index ``step * accumulation + micro``.
        config: Steps, batch size, schedule, precision, seed, device, threads.
        run_dir: Directory of the run.
        callbacks: Called in order, after every step.
        setup: Called with the optimiser before it is used.
        resume_from: Checkpoint to continue from; the remaining steps are those of a run that was
            never stopped, bit for bit with as many processes, otherwise up to rounding.
        accelerator: Of the run, from :func:`~graphmoe.train.ranks.make_accelerator`. Default: a new one.

    Raises:
        ConfigError: ``batch_size`` is no multiple of the number of processes.
        NonFiniteError: A loss or gradient is not finite, on whatever rank.
        Stopped: A signal asked to stop; the step was finished and the callbacks ran.
    """
    from accelerate.utils import send_to_device

    accelerator = make_accelerator(config) if accelerator is None else accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    share = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)
    micros, start = config.gradient_accumulation_steps, 0
    model.to(accelerator.device)
    model.train()
    rates = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        optimizer = sgd(model, **rates, momentum=config.momentum)
    else:
        optimizer = adamw(model, **rates, betas=(config.adam_beta1, config.adam_beta2))

    def learn(net: nn.Module, index: int) -> tuple[object, int]:
        """Add the gradients of one micro-batch; returns its outputs and its number of tokens."""
        batch = batches(index, config.batch_size, share)
        mask = batch.get("attention_mask")
        tokens = batch["labels"].numel() if mask is None else int(mask.sum())
        batch = send_to_device(batch, accelerator.device)
        # torch's own: accelerate fixes one precision for the life of a process.
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.bf16):
            outputs = net(**batch)
        accelerator.backward(outputs.loss / micros)
        return outputs, tokens

    def trial(net: nn.Module) -> None:
        reseed(config.seed, start, rank)
        learn(net, start * micros)

    wrapped = parallelize(accelerator, model, optimizer, trial)
    if resume_from is not None:
        start = checkpoint.restore(resume_from, model=model, optimizer=optimizer)["step"]
    if setup is not None:
        setup(optimizer)
    network = wrapped
    if config.compile_model:
        network = compiled(accelerator, wrapped, trial, tolerance=0.3 if config.bf16 else 0.1)
    schedule = lr_schedule(config)
    state = TrainState(start, config.max_steps, Path(run_dir), optimizer, accelerator)

    with stop_signals(state):
        try:
            for callback in callbacks:
                callback.on_start(state, model)
            while not state.last:
                began = time.perf_counter()
                reseed(config.seed, state.step, rank)
                lr = config.learning_rate * schedule(state.step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                sums: dict[str, Tensor] = {}
                tokens = 0
                for micro in range(micros):
                    # Gradients of ranks are put together once a step, after those of all micro-batches.
                    last = micro == micros - 1
                    with nullcontext() if last else accelerator.no_sync(wrapped):
                        outputs, count = learn(network, state.step * micros + micro)
                    tokens += count
                    for name, value in _figures(outputs).items():
                        sums[name] = sums.get(name, 0.0) + value.detach() / micros
                sums = mean_of_ranks(accelerator, sums)
                grad_norm = gradient_norm(model)
                # Before clipping, which would spread one bad number over every gradient.
                _require_finite(model, state.step, sums["loss"], grad_norm, outputs)
                nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.step += 1
                state.stop = any_rank(accelerator, state.asked)
                state.tokens += tokens * world
                state.seconds += time.perf_counter() - began
                figures = {name: float(value) for name, value in sums.items()}
                aux = {n.removeprefix("aux/"): v for n, v in figures.items() if n.startswith("aux/")}
                state.metrics = {
                    "loss": figures["loss"], "lm_loss": figures.get("lm_loss"), "aux": aux, "lr": lr,
                    "grad_norm": float(grad_norm), "tokens": tokens * world, "seconds": state.seconds,
                }  # fmt: skip
                for callback in callbacks:
                    callback.on_step(state, model, outputs)
        finally:
            for callback in callbacks:
                callback.on_end(state, model)
    if state.stop and state.step < state.max_steps:
        raise Stopped(state.stop)
    return state


@contextmanager
def stop_signals(state: TrainState):
    """Turn the first SIGINT or SIGTERM into ``state.asked``; the next one acts at once."""

    def ask(signum: int, frame: FrameType | None) -> None:
        state.asked = signum
        signal.signal(signum, before[signum])

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where nobody presses Ctrl-C
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _figures(outputs: object) -> dict[str, Tensor]:
    figures = {"loss": outputs.loss}
    if getattr(outputs, "lm_loss", None) is not None:
        figures["lm_loss"] = outputs.lm_loss
    for name, value in (getattr(outputs, "aux_losses", None) or {}).items():
        figures[f"aux/{name}"] = value
    return figures


def _require_finite(model: nn.Module, step: int, loss: Tensor, grad_norm: Tensor, outputs: object) -> None:
    if bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        return
    bad = [f"records[{i}].logits" for i, r in enumerate(getattr(outputs, "records", None) or ())
           if not r.routing.logits.isfinite().all()]  # fmt: skip
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad += [name for name, grad in grads.items() if not whole(grad).isfinite().all()]
    raise NonFiniteError(
        "loss or gradient is not finite, weights left as they were",
        f"step {step + 1}, first seen in {bad[0] if bad else 'the loss'}",
        "finite numbers; try a smaller --learning_rate",
        float(loss),
    )
