"""What a run leaves behind besides checkpoints: its config, metrics, time series and result."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graphmoe.errors import CheckpointError
from graphmoe.files import CONFIG, LIMITS, atomic_write_bytes, parse_json, read_bytes, read_json

METRICS, RECORDS, RESULT = "metrics.jsonl", "records.safetensors", "result.json"
STEP = re.compile(r"step-(\d{8,})")
"""Name of a checkpoint's folder."""


class RunRecord(NamedTuple):
    """What a run left behind, as plain data; no model is built and no checkpoint is opened.

    Attributes:
        path: The run directory.
        config: ``config.yaml``: the recipe and every flag.
        metrics: The lines of ``metrics.jsonl``.
        records: The time series of ``records.safetensors``; empty without that file.
        meta: The metadata of ``records.safetensors``; empty without that file.
        result: ``result.json``, or ``None`` while the run is not finished.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    records: dict[str, np.ndarray]
    meta: dict[str, str]
    result: dict[str, Any] | None


def read(path: str | os.PathLike) -> RunRecord:
    """Read what a run recorded, finished or not.

    Args:
        path: The run directory, or a ``step-*`` folder inside it.

    Returns:
        The record of the run. An incomplete last line of ``metrics.jsonl``, as a killed writer
        leaves it, is not part of it.

    Raises:
        CheckpointError: If ``path`` is no run, or a file of it is malformed; ``where`` names the
            file and the line.
    """
    path = Path(path)
    run_dir = path.absolute().parent if STEP.fullmatch(path.absolute().name) else path
    if not (run_dir / CONFIG).is_file():
        raise CheckpointError("this is not a run", run_dir, expected=f"a folder with {CONFIG}")
    records, meta = {}, {}
    if (run_dir / RECORDS).is_file():
        tensors, meta = read_tensors(run_dir / RECORDS)
        records = {name: _to_numpy(tensor) for name, tensor in tensors.items()}
    result = read_json(run_dir / RESULT) if (run_dir / RESULT).is_file() else None
    metrics = [metric for metric, _ in _read_metrics(run_dir)]
    return RunRecord(run_dir, _read_config(run_dir / CONFIG), metrics, records, meta, result)


def truncate_metrics(run_dir: str | os.PathLike, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` behind a step, so that a resumed run has no line twice.

    Args:
        run_dir: The run directory; without ``metrics.jsonl`` nothing happens.
        step: The last step to keep.

    Raises:
        CheckpointError: If a line other than an incomplete last one is malformed.
        CheckpointWriteError: If the file could not be rewritten; it is then unchanged.
    """
    path = Path(run_dir) / METRICS
    if path.is_file():
        lines = [line for metric, line in _read_metrics(run_dir) if metric["step"] <= step]
        atomic_write_bytes(path, b"".join(line + b"\n" for line in lines))


def write_records(
    path: str | os.PathLike, tensors: Mapping[str, Tensor | np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write time series as one safetensors file, atomically.

    Args:
        path: The file; an existing one is replaced.
        tensors: Arrays of any shape.
        metadata: Text that describes them.

    Raises:
        CheckpointWriteError: If the file system refused; an existing file is then unchanged.
    """
    owned = without_sharing({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
    atomic_write_bytes(path, save(owned, dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: If there is no such file, or it is malformed.
    """
    if not path.is_file():
        raise CheckpointError("there is no such file", path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"file cannot be read as safetensors: {error}", path) from error


def without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor contiguous CPU memory of its own: safetensors refuses shared storages."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return owned


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).clone().numpy()


def _read_config(path: Path) -> dict[str, Any]:
    text = read_bytes(path, LIMITS["yaml"])
    try:
        _check_flat(text, path)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or type(error).__name__
        raise CheckpointError(f"malformed YAML: {reason}", path) from error
    if not isinstance(config, dict):
        raise CheckpointError("malformed YAML", path, "key: value", type(config).__name__)
    return config


def _check_flat(text: bytes, path: Path) -> None:
    """Refuse aliases and deep nesting: small files of either take hours to load."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2 or isinstance(event, yaml.AliasEvent):
            raise CheckpointError("file nests values or uses an alias", path, "a flat mapping")


def _read_metrics(run_dir: str | os.PathLike) -> list[tuple[dict[str, Any], bytes]]:
    """The lines of ``metrics.jsonl``, parsed and as they are."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return []
    *lines, last = read_bytes(path, LIMITS["metrics"]).split(b"\n")
    with suppress(CheckpointError):  # a killed writer leaves half a line, which is never whole JSON
        parse_json(last, path)
        lines.append(last)
    pairs = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        metric = parse_json(line, where)
        if not isinstance(metric.get("step"), int):
            raise CheckpointError("metric has no step", where, "an integer", metric.get("step"))
        pairs.append((metric, line))
    return pairs
