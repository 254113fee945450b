"""Metrics of a run for TensorBoard or Weights & Biases, through accelerate's trackers."""

from typing import TYPE_CHECKING

from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.train.config import RunConfig
from graphmoe.train.logs import MetricsLog
from graphmoe.train.loop import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_tracker(accelerator: "Accelerator", config: RunConfig) -> None:
    """Open the tracker that ``config.track`` names, on the main rank; nothing without one.

    TensorBoard writes into the folder ``tensorboard`` of the run, or the one that ``track_project`` names;
    Weights & Biases logs a run ``run_name`` of the project ``track_project``, or ``graphmoe``.

    Args:
        accelerator: Of the run, which knows ``config.track`` and the folder.
        config: All its settings are sent along.

    Raises:
        ConfigError: If the tracker does not start.
    """
    if config.track is None:
        return
    project = config.track_project or ("tensorboard" if config.track == "tensorboard" else "graphmoe")
    options = {"wandb": {"name": config.run_name}} if config.track == "wandb" else {}
    settings = {name: value if _is_plain(value) else str(value) for name, value in vars(config).items()}
    try:
        accelerator.init_trackers(project, config=settings, init_kwargs=options)
    except Exception as error:  # each tracker objects in its own way: no login, no network, no disk
        raise ConfigError(f"tracker does not start: {error}", "--track", got=config.track) from error


class TrackedLog(MetricsLog):
    """Writes ``metrics.jsonl`` and hands every number in it to the trackers of the run's accelerator.

    A number is called after the kind of its line and its name there: ``train/loss``, ``train/aux/balance``,
    ``eval/bits_per_byte``.
    """

    def write(self, state: TrainState, line: dict) -> None:
        """Append one line and send its numbers, on the main rank."""
        super().write(state, line)
        if getattr(state.accelerator, "trackers", None):
            state.accelerator.log(scalars(line), step=line["step"])

    def on_end(self, state: TrainState, model: nn.Module) -> None:
        for tracker in getattr(state.accelerator, "trackers", ()):
            tracker.finish()


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics but its step, by kind and name; nested ones by a path."""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            parts = scalars({"kind": f"{line['kind']}/{name}", **value})
            found |= parts
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[f"{line['kind']}/{name}"] = value
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)
