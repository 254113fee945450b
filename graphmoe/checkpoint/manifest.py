"""The manifest of a checkpoint: the SHA-256 of its files, and the software that wrote them."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from graphmoe._version import __version__
from graphmoe.errors import CheckpointError
from graphmoe.files import file_names, read_json, to_json
from graphmoe.run_record import STEP

MANIFEST, STATE = "manifest.json", "state.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def verify(step_dir: str | os.PathLike) -> None:
    """Check that a checkpoint is exactly what was written.

    Hidden files (``.DS_Store``, ``.nfs*``) are not part of a checkpoint and are ignored.

    Args:
        step_dir: The folder of the checkpoint.

    Raises:
        CheckpointError: If the manifest or a file is missing, malformed or changed, or if there is a
            file that the manifest does not list; ``where`` is that file.
    """
    step_dir = Path(step_dir)
    files = read_manifest(step_dir)["files"]
    found = {name for name in file_names(step_dir) if not PurePosixPath(name).name.startswith(".")}
    for name in sorted(found - files.keys() - {MANIFEST}):
        raise CheckpointError("file is not in the manifest", step_dir / name)
    for name, digest in files.items():
        got = _sha256(step_dir / name)
        if got != digest:
            raise CheckpointError("file is damaged", step_dir / name, f"SHA-256 {digest}", got)


def read_manifest(step_dir: str | os.PathLike) -> dict[str, Any]:
    """Read the manifest of a checkpoint without hashing its files.

    Args:
        step_dir: The folder of the checkpoint.

    Returns:
        ``{"files": {name: sha256}, "versions": {...}, "threads": int, "step": int}``.

    Raises:
        CheckpointError: If it is missing, malformed, names a file outside of the folder, or belongs
            to another step.
    """
    path = Path(step_dir) / MANIFEST
    manifest = read_json(path)
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        raise CheckpointError("manifest is damaged", path, f"SHA-256 {_digest(manifest)}", digest)
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError("manifest has no table of files", path)
    for name in files:
        if not _is_inside(name):
            raise CheckpointError("manifest names a file outside of its folder", path, got=name)
    for name in (STATE, OPTIMIZER, WEIGHTS):
        if name not in files:
            raise CheckpointError("manifest lacks a file", path, expected=name)
    match = STEP.fullmatch(path.parent.name)
    if match and step != int(match[1]):
        raise CheckpointError("manifest belongs to another step", path, int(match[1]), step)
    return manifest


def write_manifest(folder: Path, step: int) -> None:
    """Hash every file of a folder into its manifest, which is the last file to be written."""
    manifest = {
        "files": {name: _sha256(folder / name) for name in sorted(file_names(folder))},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "step": step,
    }
    (folder / MANIFEST).write_bytes(to_json(manifest | {"digest": _digest(manifest)}))


def versions() -> dict[str, str]:
    """Name the software and the CPU instruction set that decide the bits of a result."""
    known = {
        "python": platform.python_version(),
        "graphmoe": __version__,
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    for name in ("torch_geometric", "transformers", "accelerate", "safetensors", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError("file is missing", path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"file cannot be read: {error.strerror}", path) from error


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash the manifest without its hash, so that damage to the manifest itself is noticed too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(path.parts) and path.as_posix() == name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts
