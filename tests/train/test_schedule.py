"""Learning-rate schedules: those that the step alone decides, and no other."""

import pytest
from transformers import SchedulerType

from graphmoe.errors import ConfigError
from graphmoe.train.config import RunConfig, parse
from graphmoe.train.schedule import lr_schedule

USABLE = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
# One watches the loss, one is a search.
UNUSABLE = {"reduce_lr_on_plateau", "greedy"}


def config(name, **values):
    return RunConfig(lr_scheduler_type=name, **{"warmup_steps": 5, "max_steps": 20, **values})


@pytest.mark.parametrize("name", USABLE)
def test_usable_schedules(name):
    schedule = lr_schedule(config(name))
    factors = [schedule(step) for step in range(20)]
    assert all(0 <= factor <= 1 for factor in factors) and max(factors) > 0.98
    assert factors == [schedule(step) for step in range(20)]  # no state: a resumed run sees the same
    assert parse(RunConfig, ["--lr_scheduler_type", name], prog="toy", description="")


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_min_lr_ratio_is_the_last_factor(floor):
    assert lr_schedule(config("cosine_with_min_lr", min_lr_ratio=floor))(20) == pytest.approx(floor)


def test_the_last_part_of_warmup_stable_decay_is_a_line():
    schedule = lr_schedule(config("warmup_stable_decay", min_lr_ratio=0.1))
    factors = [schedule(step) for step in range(21)]
    assert factors[5:13] == [1.0] * 8 and factors[20] == pytest.approx(0.1)
    assert factors[16] == pytest.approx(0.55) and factors[4] < 1
    short = lr_schedule(config("warmup_stable_decay", max_steps=2))  # ends before it has warmed up
    assert 0 <= short(0) < short(1) < 0.5


@pytest.mark.parametrize("name", sorted(UNUSABLE & {kind.value for kind in SchedulerType}))
def test_other_schedules_are_refused_and_the_usable_are_listed(name):
    message = (
        f"^--lr_scheduler_type: schedule {name} cannot be built from the flags of a run; expected one of "
    )
    with pytest.raises(ConfigError, match=message) as caught:
        parse(RunConfig, ["--lr_scheduler_type", name], prog="toy", description="")
    listed = set(caught.value.expected.removeprefix("one of ").split(", "))
    assert listed >= set(USABLE) and not listed & UNUSABLE


def test_unknown_schedule():
    message = "^--lr_scheduler_type: unknown schedule cosin; did you mean cosine[?]; expected one of linear, "
    with pytest.raises(ConfigError, match=message):
        parse(RunConfig, ["--lr_scheduler_type", "cosin"], prog="toy", description="")


def test_a_value_that_a_schedule_refuses():
    with pytest.raises(ConfigError, match="schedule polynomial cannot be built") as caught:
        lr_schedule(config("polynomial", learning_rate=1e-8))
    assert "linear" in caught.value.expected and "polynomial" not in caught.value.expected
