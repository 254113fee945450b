"""Files that survive a crash: atomic writes, bounded reads, durable folders, one writer a run.

Nothing here knows what a model is, and nothing here can execute what it reads.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import errorcode
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graphmoe.errors import CheckpointError, CheckpointWriteError, GraphMoEError

CONFIG, LOCK = "config.yaml", ".lock"
LIMITS = {"yaml": 2**20, "json": 2**26, "metrics": 2**28}
"""Largest text file that is read, in bytes."""


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, finds the old or the new content, never a mixture.

    Args:
        path: The file; its folder must exist.
        data: The new content.

    Raises:
        CheckpointWriteError: If the file system refused; an existing file is then unchanged.
    """
    path = Path(path)
    draft = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with write_errors(path):
            draft.write_bytes(data)
            _sync(draft)
            os.replace(draft, path)
            _sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write a JSON-serialisable object as readable JSON, with :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, to_json(obj))


def read_bytes(path: str | os.PathLike, limit: int, *, error: type[GraphMoEError] = CheckpointError) -> bytes:
    """Read a regular file of bounded size.

    Args:
        path: The file.
        limit: Largest size, in bytes.
        error: The type of error to raise.

    Returns:
        The content.

    Raises:
        error: If there is no such file, or it is too large or unreadable.
    """
    path = Path(path)
    if not path.is_file():  # also keeps a pipe from blocking
        raise error("there is no such file", path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as cause:
        raise error(f"file cannot be read: {cause.strerror}", path) from cause
    if len(data) > limit:
        raise error("file is too large", path, f"at most {limit} bytes")
    return data


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: If it is missing, larger than ``LIMITS["json"]``, or holds anything else.
    """
    return parse_json(read_bytes(path, LIMITS["json"]), path)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Parse a JSON object; a :class:`CheckpointError` says ``where`` it is malformed."""
    try:
        obj = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"malformed JSON: {error}", where) from error
    if not isinstance(obj, dict):
        raise CheckpointError("malformed JSON", where, "an object", type(obj).__name__)
    return obj


def to_json(obj: Any) -> bytes:
    """The bytes of a readable JSON file."""
    return json.dumps(obj, indent=2).encode() + b"\n"


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says, itself or through safetensors, into a ``CheckpointWriteError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if match := re.search(r"os error (\d+)", str(error)):
            code, reason = int(match[1]), os.strerror(int(match[1]))
        name = errorcode.get(code)
        raise CheckpointWriteError(f"could not be written: {reason or error}", path, got=name) from error


def file_names(folder: Path) -> list[str]:
    """Everything below a folder that is no folder, as relative POSIX paths."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def sync_tree(folder: Path, *, mode: int) -> None:
    """Give all files below a folder one mode, then flush files before the folders that hold them."""
    for name in file_names(folder):
        os.chmod(folder / name, mode)
        _sync(folder / name)
    for sub in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        _sync(sub)
    _sync(folder)


def publish(draft: Path, final: Path) -> None:
    """Rename a flushed folder to its name and make the rename durable; undo it if that fails.

    A folder cannot be renamed over a full one, so an existing one steps aside first. A kill between
    the two renames leaves it under the name from which :func:`remove_leftovers` brings it back.
    """
    aside = final.with_name(f".old-{final.name}")
    replaces = final.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    try:
        os.replace(draft, final)
        _sync(final.parent)
    except BaseException:
        if final.exists():
            os.replace(final, draft)
        if replaces:
            os.replace(aside, final)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Tidy up what killed writers left in a folder; a read-only one stays as it is."""
    with suppress(OSError):
        for aside in folder.glob(".old-*"):
            final = folder / aside.name.removeprefix(".old-")
            if final.exists():
                shutil.rmtree(aside)
            else:
                os.replace(aside, final)
        for draft in folder.glob(".tmp-*"):
            if draft.is_dir():
                shutil.rmtree(draft)
            else:
                draft.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class RunLock:
    """The right to write into a run directory, held by one process at a time.

    The lock ends with the process that holds it, however that ends; the file ``.lock`` stays.

    Args:
        run_dir: The run directory; must exist.

    Raises:
        CheckpointError: On entry, if another process (or another lock of this one) holds it; process
            id and host of the holder are named, and nothing is written.
    """

    def __init__(self, run_dir: str | os.PathLike):
        self.run_dir = Path(run_dir)

    def __enter__(self) -> "RunLock":
        try:
            fd = os.open(self.run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CheckpointError(f"run cannot be locked: {error.strerror}", self.run_dir) from error
        try:
            if not _try_lock(fd, fcntl.LOCK_EX):
                pid, host = _holder(fd)
                raise CheckpointError(f"run is in use by process {pid} on host {host}", self.run_dir)
            with write_errors(self.run_dir / LOCK):
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def in_use_elsewhere(run_dir: Path) -> bool:
    """Whether another process holds the lock of a run directory."""
    try:
        fd = os.open(run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH) and _holder(fd) != (os.getpid(), socket.gethostname())
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> tuple[Any, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return holder["pid"], holder["host"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "?", "?"
