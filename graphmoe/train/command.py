"""A command around a run: the device and the directory it gets, and the exit status it ends with."""

import os
import select
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.files import CONFIG, LOCK, RunLock
from graphmoe.train.yaml_config import read_flat_yaml

if TYPE_CHECKING:
    from graphmoe.train.config import RunConfig


class Stopped(Exception):
    """A run that ended early because it was asked to, after saving what it had.

    Args:
        signum: The signal that asked, such as ``signal.SIGTERM``.
    """

    def __init__(self, signum: int):
        self.signum = int(signum)
        super().__init__(f"stopped by signal {self.signum}")


def exit_code(main: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn how it ended into the exit status of the process.

    Args:
        main: The command; called with ``argv``.
        argv: Its arguments; ``None`` leaves the choice to ``main``.

    Returns:
        0; or 2 after a :class:`~graphmoe.errors.GraphMoEError`, written to stderr as one line (of the
        processes that torchrun starts on a machine, by the first); or 130 after Ctrl-C; or
        ``128 + signum`` after :class:`Stopped` (143 for SIGTERM); or 141 where nobody reads stdout any more,
        as behind ``| head``.
    """
    try:
        main(argv)
        sys.stdout.flush()
    except Stopped as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except GraphMoEError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2  # all processes end for the same reason, and the first says it
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        return 2
    return 0


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader; what is still to be written to it is then thrown away."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except (OSError, ValueError, AttributeError):  # no file, or a system without it
        return False
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # Python flushes once more when it exits, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def resolve_device(name: str) -> str:
    """Choose the device to compute on.

    Args:
        name: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: If CUDA is asked for and absent.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("torch finds no CUDA device", "--device", "auto or cpu", name)
    return "cuda" if available and name != "cpu" else "cpu"


def open_run(config: "RunConfig", *, dry: bool = False) -> Path:
    """Decide the directory of a run and make it ready to be written to.

    Args:
        config: Says where (``out_dir``, ``run_name``) and how (``resume``, ``overwrite``).
        dry: Only check, so that a run that cannot start says so before slow work begins.

    Returns:
        ``out_dir/run_name``. Unless ``dry``, it exists, and is empty if the run is not resumed.

    Raises:
        ConfigError: If the directory holds something and neither ``resume`` nor ``overwrite`` is
            set, if there is nothing to resume, or if what should be overwritten is no run. Nothing is
            changed then.
        CheckpointError: If another process is writing into a run that should be overwritten.
    """
    if config.run_name is None:
        raise ConfigError("a run needs a name", "--run_name")
    run_dir = Path(config.out_dir) / config.run_name
    if config.resume:
        if not (run_dir / CONFIG).is_file():
            raise ConfigError("there is no run to resume", run_dir)
        return run_dir
    try:
        content = [path for path in run_dir.iterdir() if path.name != LOCK] if run_dir.exists() else []
        if content and not config.overwrite:
            raise ConfigError("run exists", run_dir, expected="--resume, --overwrite or another --run_name")
        if content and not _is_run(run_dir):
            raise ConfigError("this is no run and is not overwritten", run_dir, f"a {CONFIG} with a recipe")
        if not dry:
            run_dir.mkdir(parents=True, exist_ok=True)
            _remove(run_dir, content)
    except OSError as error:
        raise ConfigError(f"run directory cannot be used: {error.strerror}", run_dir) from error
    return run_dir


def _is_run(run_dir: Path) -> bool:
    try:
        return "recipe" in read_flat_yaml(run_dir / CONFIG)
    except ConfigError:
        return False


def _remove(run_dir: Path, content: Collection[Path]) -> None:
    if not content:
        return
    with RunLock(run_dir):
        # The config goes last: until then an interrupted removal can be repeated.
        for path in sorted(content, key=lambda path: path.name == CONFIG):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
