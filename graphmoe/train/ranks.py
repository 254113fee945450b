"""What the processes of one run have to agree on."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.train.config import RunConfig, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: RunConfig) -> "Accelerator":
    """The accelerator of a run.

    Raises:
        ConfigError: ``batch_size`` is no multiple of the number of processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # All ranks move their buffers alike; sending around those of rank 0 would hide that one does not.
    options = DistributedDataParallelKwargs(broadcast_buffers=False)
    # Without cpu=True a CPU run under torchrun would be independent copies.
    accelerator = Accelerator(cpu=resolve_device(config.device) == "cpu", kwargs_handlers=[options])
    world = accelerator.num_processes
    if config.batch_size % world:
        # The mean over ranks of means over unequal shares would not be the mean over the batch.
        what = f"batch does not divide among {world} processes"
        raise ConfigError(what, "--batch_size", f"a multiple of {world}", config.batch_size)
    return accelerator


def mean_of_ranks(accelerator: "Accelerator", figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of the global batch, so that all ranks refuse a loss or none does."""
    if accelerator.num_processes == 1:
        return figures
    values = torch.stack([value.double() for value in figures.values()])
    return dict(zip(figures, accelerator.reduce(values, "mean"), strict=True))


def any_rank(accelerator: "Accelerator", signum: int) -> int:
    """The signal that arrived on any rank, or 0; equal on all ranks.

    Args:
        accelerator: Of the run.
        signum: The signal that arrived on this rank, or 0.
    """
    if accelerator.num_processes == 1:
        return signum
    asked = torch.tensor([signum], device=accelerator.device)
    return int(accelerator.gather(asked).max())
