"""What the processes of one run have to agree on.

A process is called by its rank, as torch does; rank 0 is the main one, the only one that writes. What is
called a collective has to be called by every rank, in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.train.config import RunConfig, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another, which may be hashing checkpoints, writing one or drawing pictures. A
rank that ends lets its launcher end the others at once."""

_LINE = 1000  # bytes of an exchanged line


class OtherRankError(GraphMoEError):
    """Something went wrong in another process of the run, which makes this one end, too."""


def launched_rank() -> int:
    """Rank of this process, as its launcher (torchrun) numbers it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launched_processes() -> int:
    """Number of processes that a launcher (torchrun) started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(config: RunConfig) -> "Accelerator":
    """The accelerator of a run. Where a launcher started several processes, this is a collective.

    Raises:
        ConfigError: ``batch_size`` is no multiple of the number of processes, or the package of ``track``
            is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    world = launched_processes()
    if config.batch_size % world:
        # The mean over ranks of means over unequal shares would not be the mean over the batch.
        what = f"batch does not divide among {world} processes"
        raise ConfigError(what, "--batch_size", f"a multiple of {world}", config.batch_size)
    if config.track is not None and find_spec(config.track) is None:
        hint = {"tensorboard": 'pip install "graphmoe[track]"'}.get(
            config.track, f"pip install {config.track}"
        )
        raise ConfigError("package is not installed", "--track", hint, config.track)
    on_cpu = resolve_device(config.device) == "cpu"
    shards = config.parallel == "fsdp" and world > 1
    plugin = _sharding() if shards else None
    accelerator = Accelerator(
        # Without cpu=True a CPU run under torchrun would be independent copies.
        cpu=on_cpu,
        fsdp_plugin=None if on_cpu else plugin,
        log_with=config.track,
        project_dir=None if config.run_name is None else Path(config.out_dir) / config.run_name,
        kwargs_handlers=[
            # All ranks move their buffers alike; sending around those of rank 0 would hide that one does not.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if on_cpu and accelerator.num_processes > 1:
        _shard_on_cpu(accelerator, plugin)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)  # Accelerator sets its own number
    return accelerator


def leave() -> None:
    """End what :func:`make_accelerator` began, when all ranks are done with one another."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _sharding():
    """Plugin of accelerate that splits every parameter among the ranks, a block at a time (FSDP2)."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,  # every rank builds the same weights from the same seed
    )


def _shard_on_cpu(accelerator: "Accelerator", plugin: object | None) -> None:
    """Torch shards with gloo as well, but accelerate takes the plugin where there are GPUs only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    kind = DistributedType.MULTI_CPU if plugin is None else DistributedType.FSDP
    # Both: a new view of the accelerator's state copies what the partial one says.
    accelerator.state.distributed_type = PartialState().distributed_type = kind
    accelerator.state.fsdp_plugin = plugin


@contextmanager
def together(accelerator: "Accelerator") -> Iterator[None]:
    """Raise in every rank what one of them raises inside, so that none waits for one that is gone.

    The end is a collective, so there must be none inside.

    Raises:
        OtherRankError: In the ranks where nothing went wrong; it repeats what the first other one says.
    """
    if accelerator.num_processes == 1:
        yield
        return
    error = None
    try:
        yield
    except BaseException as raised:
        error = raised
    lines = _exchange(accelerator, "" if error is None else f"{error}" or type(error).__name__)
    if error is not None:
        raise error
    for rank, line in enumerate(lines):
        if line:
            raise OtherRankError(f"{line} (process {rank})")


def from_main(accelerator: "Accelerator", text: str) -> str:
    """The ``text`` of the main rank, at most 1000 bytes of it; a collective."""
    return text if accelerator.num_processes == 1 else _exchange(accelerator, text)[0]


def require_equal(accelerator: "Accelerator", what: str, text: str) -> None:
    """A collective.

    Raises:
        GraphMoEError: The ranks have another ``text`` for ``what`` each.
    """
    if accelerator.num_processes == 1:
        return
    texts = _exchange(accelerator, text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise GraphMoEError(f"processes differ in the {what}", f"process {rank}", texts[0], other)


def _exchange(accelerator: "Accelerator", text: str) -> list[str]:
    """One line of each rank, by rank. Bytes rather than objects, which would have to be unpickled."""
    data = " ".join(text.split()).encode()[:_LINE]
    line = torch.zeros(1, _LINE, dtype=torch.uint8)
    line[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    lines = accelerator.gather(line.to(accelerator.device)).cpu()
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in lines]


def mean_of_ranks(accelerator: "Accelerator", figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of the global batch, so that all ranks refuse a loss or none does; a collective."""
    if accelerator.num_processes == 1:
        return figures
    values = torch.stack([value.double() for value in figures.values()])
    return dict(zip(figures, accelerator.reduce(values, "mean"), strict=True))


def sum_of_ranks(accelerator: "Accelerator", counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over ranks of tensors of any shape, in one exchange; all ranks must call it with equal shapes."""
    if accelerator.num_processes == 1:
        return counts
    parts = torch.cat([value.double().flatten() for value in counts.values()])
    sums = accelerator.reduce(parts, "sum").split([value.numel() for value in counts.values()])
    return {name: part.view_as(counts[name]) for name, part in zip(counts, sums, strict=True)}


def mean_of_shares(
    accelerator: "Accelerator", score: Callable[[np.ndarray], float], rows: np.ndarray
) -> float:
    """Mean of a figure over rows, of which each rank scores a share; a collective.

    All ranks call ``score`` equally often with equally many rows, so it may itself be a collective, such
    as the forward pass of a sharded model.

    Args:
        accelerator: Of the run.
        score: ``rows [n, ...] -> float``, their mean.
        rows: All rows, equal on all ranks.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    even = len(rows) // world * world
    if world == 1 or even == 0:
        return score(rows)
    share = score(rows[rank:even:world]) * (even // world)
    total = accelerator.reduce(torch.tensor(share, dtype=torch.float64, device=accelerator.device), "sum")
    rest = score(rows[even:]) * (len(rows) - even) if even < len(rows) else 0.0
    return (total.item() + rest) / len(rows)


def any_rank(accelerator: "Accelerator", signum: int) -> int:
    """The signal that arrived on any rank, or 0; equal on all ranks, a collective.

    Args:
        accelerator: Of the run.
        signum: The signal that arrived on this rank, or 0.
    """
    if accelerator.num_processes == 1:
        return signum
    asked = torch.tensor([signum], device=accelerator.device)
    return int(accelerator.gather(asked).max())
