from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.train.budget import BudgetRamp


def strengths(ramp: BudgetRamp, max_steps: int, start: int = 0) -> list[float]:
    """The factor that each step of a run trains with, from the step ``start`` on."""
    model, state = nn.Module(), SimpleNamespace(step=start, max_steps=max_steps)
    model.register_buffer("budget_strength", torch.ones(()))
    ramp.on_start(state, model)
    found = []
    for _ in range(start, max_steps):
        found.append(float(model.budget_strength))
        state.step += 1
        ramp.on_step(state, model, None)
    return found


def test_rises_between_the_two_fractions():
    assert strengths(BudgetRamp(0.2, 0.6), 10) == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert strengths(BudgetRamp(0.5, 0.5), 4) == [0, 0, 1, 1]
    assert strengths(BudgetRamp(0, 0), 3) == [1, 1, 1]


def test_a_resumed_run_goes_on_with_the_same_factors():
    whole = strengths(BudgetRamp(0.2, 0.6), 10)
    assert strengths(BudgetRamp(0.2, 0.6), 10, start=4) == whole[4:]


@pytest.mark.parametrize("begin, end", [(0.5, 0.4), (-0.1, 0.4), (0.1, 1.1)])
def test_wrong_input(begin, end):
    with pytest.raises(ConfigError, match="budget_begin: fractions out of order"):
        BudgetRamp(begin, end)
