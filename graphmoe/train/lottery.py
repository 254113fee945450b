"""Lottery tickets: sparse networks that train from the weights of an early step.

Pruning a trained network leaves a mask; the *ticket* is that mask and the weights of an early step of the
training of the dense network, 0 (`Frankle & Carbin 2019 <https://arxiv.org/abs/1803.03635>`_) or a later one
(`Frankle et al. 2020 <https://arxiv.org/abs/1912.05671>`_). One training of each network is a call of
:func:`~graphmoe.train.loop.fit` with the callbacks below::

    masks = Masks.full(model)
    fit(model, ..., callbacks=[KeepState(path, step), EnforceMasks(masks)])  # the dense network
    masks = masks.prune(model, 0.2)
    fit(model, ..., callbacks=[Rewind(path, step), EnforceMasks(masks)])  # the ticket
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphmoe.checkpoint import read_tensors, write_records
from graphmoe.checkpoint.shards import is_shard
from graphmoe.checkpoint.tensors import load_model
from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.pruning_mask import Masks, entries_of, prunable_weights

__all__ = ["EnforceMasks", "KeepState", "Masks", "Rewind", "prunable_weights"]


class KeepState(Callback):
    """Writes parameters and buffers as they are after some step, for :class:`Rewind`.

    Args:
        path: A safetensors file.
        step: Optimiser steps done; 0 for the initial weights.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.step = Path(path), step

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        self.on_step(state, model, None)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        if state.step == self.step and state.accelerator.is_main_process:
            write_records(self.path, model.state_dict(), {"step": str(self.step)})


class Rewind(Callback):
    """Begins a run at a step of another one, with its weights of then: all parameters and buffers, not only
    those that are pruned. Data and learning rates go on from that step, the optimiser begins anew.

    Args:
        path: What :class:`KeepState` wrote.
        step: The step of it.

    Raises:
        CheckpointError: There is no such file, or its tensors do not fit the model.
        ConfigError: It is of another step.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.step = Path(path), step

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        if state.step > self.step:  # a resumed run, which is behind it
            return
        _, facts = read_tensors(self.path)
        if facts.get("step") != str(self.step):
            raise ConfigError("weights of another step", self.path, self.step, facts.get("step"))
        load_model(self.path, model)
        state.step = self.step


class EnforceMasks(Callback):
    """Keeps what was pruned at 0, whatever momentum and weight decay say, and audits that it is.

    Before the first step and after every one, pruned weights and what the optimiser keeps for them become 0.
    Their gradients are 0 as well, so that the norm that limits gradients is that of the sparse network. Put
    it behind :class:`Rewind` and before anything that reads the weights.

    Args:
        masks: What exists.
        audit_every: Optimiser steps between audits; the last step has one in any case.

    Attributes:
        audits: Audits that were made.

    Raises:
        ConfigError: Masks of other parameters or shapes, no interval, or sharded parameters.
        GraphMoEError: An audit found something that is not 0.
    """

    def __init__(self, masks: Masks, *, audit_every: int = 100):
        if audit_every < 1:
            raise ConfigError("no interval", "audit_every", "at least 1 step", audit_every)
        self.masks, self.audit_every, self.audits = masks, audit_every, 0
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._hooks: list = []

    def on_start(self, state: TrainState, model: nn.Module) -> None:
        parameters = self.masks.parameters(model)
        if any(is_shard(parameter) for parameter in parameters.values()):
            raise ConfigError("sharded weights cannot be pruned", "--parallel", "ddp", "fsdp")
        # Factors 0 and 1: many times faster than filling by a mask of bools.
        self._kept = {
            parameter: self.masks[name].to(parameter.device, parameter.dtype)
            for name, parameter in parameters.items()
            if not self.masks[name].all()
        }
        for parameter, kept in self._kept.items():
            self._hooks.append(parameter.register_hook(lambda grad, kept=kept: grad * kept))
        enforce(self._kept, state.optimizer)

    def on_step(self, state: TrainState, model: nn.Module, outputs: object) -> None:
        enforce(self._kept, state.optimizer)
        if state.last or state.step % self.audit_every == 0:
            require_enforced(self.masks, model, state.optimizer)
            self.audits += 1

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@torch.no_grad()
def enforce(kept: Mapping[nn.Parameter, Tensor], optimizer: Optimizer) -> None:
    """Multiply parameters, and what an optimiser keeps for their entries, by factors 0 or 1."""
    for parameter, factors in kept.items():
        for tensor in (parameter, *entries_of(optimizer.state.get(parameter, {}), parameter)):
            tensor.mul_(factors)


def require_enforced(masks: Masks, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Refuse a model that has anything but 0 where a weight does not exist.

    Raises:
        GraphMoEError: It has; the first such layer is named.
    """
    for name, count in masks.outside(model, optimizer).items():
        if count:
            raise GraphMoEError("pruned weights are not 0: the mask was not applied", name, 0, count)
