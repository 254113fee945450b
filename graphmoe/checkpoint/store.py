"""Save a checkpoint, find the newest good one, put it back."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from graphmoe.checkpoint.manifest import MANIFEST, OPTIMIZER, STATE, WEIGHTS, verify, write_manifest
from graphmoe.checkpoint.shards import WholeState
from graphmoe.checkpoint.tensors import load_model, read_optimizer, write_model, write_optimizer
from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.files import (
    in_use_elsewhere,
    publish,
    read_json,
    remove_leftovers,
    sync_tree,
    to_json,
    write_errors,
)
from graphmoe.run_record import STEP


def save(
    run_dir: str | os.PathLike,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    extras: Sequence[Callable[[Path], None]] = (),
    keep: int = 2,
    whole: WholeState | None = None,
) -> Path:
    """Write the checkpoint ``run_dir/step-<step>`` whole and durably, or leave the run as it was.

    The hyperparameters of ``optimizer`` (``param_groups``) are not stored: they belong to the
    config and to the schedule, which is a function of the step.

    Args:
        run_dir: The run directory; created when missing.
        step: Number of optimiser steps taken.
        model: Written by its ``save_pretrained`` if it has one, else as a safetensors state dict in
            which tensors that share memory appear once.
        optimizer: Its per-parameter state is stored under the names of ``model.named_parameters()``.
        state: What else the loop needs to go on; must be JSON-serialisable. :func:`restore`
            needs an integer ``step`` in it.
        extras: Called with the folder being written, to add files such as a tokenizer.
        keep: Number of newest checkpoints to keep, at least 1. Older ones are deleted only after
            the new one is durable.
        whole: What :func:`~graphmoe.checkpoint.whole_state` collected, if ``model`` is sharded; the files
            are then those of a model that is not.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointWriteError: If the file system refused (disk full, no permission, ...); earlier
            checkpoints are untouched.
    """
    if keep < 1:
        raise ConfigError("at least one checkpoint has to be kept", "keep", "a number >= 1", keep)
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step:08d}"
    draft = _draft(final)
    try:
        with write_errors(final):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            weights, slots = (None, None) if whole is None else whole
            write_model(draft / WEIGHTS, model, weights)
            write_optimizer(draft / OPTIMIZER, model, optimizer, slots)
            (draft / STATE).write_bytes(to_json(state))
            for extra in extras:
                extra(draft)
            write_manifest(draft, step)
            # safetensors always writes 0600; the manifest has the mode that the umask asks for.
            sync_tree(draft, mode=(draft / MANIFEST).stat().st_mode & 0o777)
            publish(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _prune(run_dir, keep, newest=final)
    return final


def latest(run_dir: str | os.PathLike) -> Path | None:
    """Find the newest good checkpoint of a run and tidy up what a killed writer left.

    A damaged checkpoint is reported in a warning that names the bad file, renamed to
    ``damaged-step-...`` and never deleted; the one before it is used. While another process trains
    in ``run_dir``, nothing is renamed or removed.

    Args:
        run_dir: The run directory.

    Returns:
        The newest checkpoint that verifies, or ``None`` if the run has no checkpoint yet.

    Raises:
        CheckpointError: If there are checkpoints and all of them are damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return None
    tidy = not in_use_elsewhere(run_dir)
    if tidy:
        remove_leftovers(run_dir)
    bad = [path.name for path in run_dir.glob("damaged-step-*")]
    for step_dir in _steps(run_dir):
        try:
            verify(step_dir)
        except CheckpointError as error:
            bad.append(step_dir.name)
            warnings.warn(f"damaged checkpoint not used: {error}", stacklevel=2)
            if tidy:
                _set_aside(step_dir)
        else:
            return step_dir
    if bad:
        raise CheckpointError("every checkpoint of the run is damaged", run_dir, got=", ".join(sorted(bad)))
    return None


def restore(
    step_dir: str | os.PathLike, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Put a checkpoint back, bit for bit; a checkpoint that does not fit changes nothing.

    Files are not hashed again: :func:`latest` and :func:`verify` do that. A sharded model takes its slices;
    every process reads the files itself.

    Args:
        step_dir: The folder of the checkpoint.
        model: Receives parameters and buffers. Every tensor must be in the file, except one that
            shares its memory with another (tied weights).
        optimizer: Receives its per-parameter state with the stored dtypes. Its hyperparameters stay.

    Returns:
        The ``state`` that was given to :func:`save`.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, or has another shape or dtype; it is
            named. Also if the state has no integer ``step``.
    """
    step_dir = Path(step_dir)
    state = read_json(step_dir / STATE)
    if type(state.get("step")) is not int:  # a bool is an int, too
        raise CheckpointError("state has no step", step_dir / STATE, "an integer", state.get("step"))
    slots = None if optimizer is None else read_optimizer(step_dir / OPTIMIZER, model, optimizer)
    load_model(step_dir / WEIGHTS, model)
    if optimizer is not None:
        optimizer.state.clear()
        optimizer.state.update(slots)
    return state


def _draft(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def _steps(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [(int(match[1]), path) for path in run_dir.iterdir() if (match := STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def _prune(run_dir: Path, keep: int, newest: Path) -> None:
    """Delete all but ``keep`` steps. Each is renamed first: a kill leaves a draft, not a damaged step."""
    old = [path for path in _steps(run_dir) if path != newest]
    for path in old[keep - 1 :]:
        grave = _draft(path)
        try:
            os.replace(path, grave)
            shutil.rmtree(grave)
        except OSError as error:
            warnings.warn(f"old checkpoint {path} could not be deleted: {error.strerror}", stacklevel=3)


def _set_aside(step_dir: Path) -> None:
    target, number = step_dir.with_name(f"damaged-{step_dir.name}"), 1
    while target.exists():
        number += 1
        target = step_dir.with_name(f"damaged-{step_dir.name}-{number}")
    with suppress(OSError):  # a run on a read-only disk can still be resumed elsewhere
        os.replace(step_dir, target)
