"""The learning rate as a function of the step."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from graphmoe.errors import ConfigError
from graphmoe.train.flags import suggestion

if TYPE_CHECKING:
    from graphmoe.train.config import RunConfig


DECAY = 0.4
"""Share of the steps at the end in which ``warmup_stable_decay`` lowers the rate, on a line."""


def lr_schedule(config: "RunConfig") -> Callable[[int], float]:
    """Build the learning-rate schedule of a run, one of transformers' that needs the step alone.

    A schedule that watches the loss has a state, so a resumed run would not repeat an uninterrupted
    one; a schedule with settings of its own would need flags of its own.

    Args:
        config: ``lr_scheduler_type`` and what schedules depend on: ``learning_rate``,
            ``warmup_steps``, ``max_steps`` and, for the schedules that have a floor, ``min_lr_ratio``.

    Returns:
        ``step -> factor`` of the peak learning rate, where ``step`` optimiser steps are done.

    Raises:
        ConfigError: If there is no such schedule, or it cannot be built from these settings; the
            names that can are listed.
    """
    from transformers import SchedulerType

    name, known = config.lr_scheduler_type, [kind.value for kind in SchedulerType]
    schedule = _build(name, config) if name in known else None
    if schedule is None:
        what = f"schedule {name} cannot be built from the flags of a run"
        if name not in known:
            what = f"unknown schedule {name}{suggestion(name, known)}"
        usable = [other for other in known if _build(other, config) is not None]
        raise ConfigError(what, "--lr_scheduler_type", f"one of {', '.join(usable)}")
    return schedule


def _build(name: str, config: "RunConfig") -> Callable[[int], float] | None:
    import torch
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    own = {"min_lr_rate": config.min_lr_ratio} if "min_lr" in name else {}
    if name == "warmup_stable_decay":
        steps = max(1, round(DECAY * config.max_steps))
        steps = min(steps, max(0, config.max_steps - config.warmup_steps))
        own = {"num_decay_steps": steps, "decay_type": "linear", "min_lr_ratio": config.min_lr_ratio}
    try:
        scheduler = get_scheduler(name, stand_in, config.warmup_steps, config.max_steps, own)
    except Exception:  # each schedule objects in its own way to what it lacks
        return None
    return scheduler.lr_lambdas[0] if type(scheduler) is torch.optim.lr_scheduler.LambdaLR else None
