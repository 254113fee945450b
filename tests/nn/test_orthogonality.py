import copy

import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.loss import orthogonality
from graphmoe.metrics import random_specialisation, specialisation
from graphmoe.nn import OrthogonalityStrength


def relative(rows):
    return specialisation(rows) / random_specialisation(*rows.shape)


def run(state, values, times=None):
    """Strengths after each step, ``[steps, L]``."""
    seen = []
    for index, value in enumerate(values):
        state.observe(torch.as_tensor(value), 1.0 if times is None else times[index])
        seen.append(state())
    return torch.stack(seen)


def constant(value, layers=3):
    return torch.full((layers,), value)


def test_starts_at_base_and_holds_for_an_interval():
    state = OrthogonalityStrength(3, interval=5)
    want = torch.tensor([0.1, 0.08, 0.064])
    torch.testing.assert_close(state(), want)
    for row in run(state, [constant(0.1)] * 4):
        torch.testing.assert_close(row, want)
    torch.testing.assert_close(run(state, [constant(0.1)])[0], 1.5 * want)


def test_begin_sets_the_first_interval_only():
    state = OrthogonalityStrength(2, interval=5)
    state.begin(0.5)
    torch.testing.assert_close(state(), torch.tensor([0.05, 0.04]))
    state.begin(0.0)
    torch.testing.assert_close(state(), torch.tensor([1e-3, 1e-3]))
    run(state, [constant(0.95, 2)])
    state.begin(1.0)
    torch.testing.assert_close(state(), torch.tensor([1e-3, 1e-3]))


@pytest.mark.parametrize(
    "value, factor", [(0.5, 1.5), (0.92, 1.5), (0.94, 1.0), (0.95, 1.0), (0.96, 1.0), (0.98, 0.7), (1.2, 0.7)]
)
def test_performance_by_hand(value, factor):
    state = OrthogonalityStrength(3, interval=2)
    strength = run(state, [constant(value)] * 2)[-1]
    torch.testing.assert_close(strength, factor * torch.tensor([0.1, 0.08, 0.064]))


def test_layers_adapt_each_for_itself_to_the_mean_of_the_interval():
    state = OrthogonalityStrength(3, interval=2, decay=1.0)
    strength = run(state, [[0.0, 0.90, 1.0], [0.5, 1.0, 1.0]])[-1]  # means 0.25, 0.95, 1
    torch.testing.assert_close(strength, torch.tensor([0.15, 0.1, 0.07]))


def test_every_adjustment_starts_from_base():
    state = OrthogonalityStrength(3, interval=4)
    seen = run(state, [constant(0.2)] * 40)
    assert all(torch.equal(row, seen[3]) for row in seen[3:])


def test_emergency_doubles_once():
    state = OrthogonalityStrength(1, interval=2)
    values = [0.95] * 2 + [0.84] * 2 + [0.80] * 2 + [0.85] * 2 + [0.951] * 2
    strength = run(state, torch.tensor(values).unsqueeze(1))[1::2, 0]
    # fell by 0.11 (doubled); by 0.04; rose; rose
    torch.testing.assert_close(strength, torch.tensor([0.1, 0.3, 0.15, 0.15, 0.1]))


def test_the_first_interval_is_no_fall():
    state = OrthogonalityStrength(1, interval=1)
    assert run(state, [[-0.5]])[0].item() == pytest.approx(0.15)


def test_time_scales_at_adjustments_only():
    state = OrthogonalityStrength(1, interval=2)
    seen = run(state, [[0.95]] * 6, times=[0.9, 0.8, 0.7, 0.6, 0.5, 0.0])[:, 0]
    torch.testing.assert_close(seen, torch.tensor([0.1, 0.08, 0.08, 0.06, 0.06, 0.001]))


def test_never_leaves_its_bounds():
    state = OrthogonalityStrength(4, interval=3, low=0.02, high=0.11)
    values, times = torch.rand(600, 4) * 1.4 - 0.1, torch.rand(600).tolist()
    seen = run(state, values, times)
    assert seen.min() == torch.tensor(0.02) and seen.max() == torch.tensor(0.11)
    assert len(seen.unique()) > 50


def test_experts_forced_to_overlap_raise_the_strength_and_are_driven_apart():
    rows = torch.nn.Parameter(torch.randn(1, 64) + 0.1 * torch.randn(6, 64))
    state = OrthogonalityStrength(1, interval=20)
    optimizer = torch.optim.SGD([rows], lr=20.0)
    overlap, strength, different = [], [], []
    for _ in range(400):
        loss = orthogonality(rows)
        (state()[0] * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        overlap.append(loss.item())
        different.append(relative(rows.detach()).item())
        state.observe(torch.tensor([different[-1]]), 1.0)
        strength.append(state()[0].item())
    assert overlap[0] > 0.9 and different[0] < 0.1
    assert strength[0] == pytest.approx(0.1) and strength[20] == pytest.approx(0.15)
    assert overlap[-1] < 0.05 and different[-1] > 0.97
    assert strength[-1] == pytest.approx(0.07)  # and once they differ, it goes below base


def test_state_round_trip_in_the_middle_of_an_interval():
    values = torch.rand(60, 3) * 1.2
    state = OrthogonalityStrength(3, interval=7)
    run(state, values[:24])
    fresh = OrthogonalityStrength(3, interval=7)
    fresh.load_state_dict(copy.deepcopy(state.state_dict()))
    assert torch.equal(run(state, values[24:]), run(fresh, values[24:]))
    assert all(torch.equal(a, b) for a, b in zip(state.buffers(), fresh.buffers(), strict=True))


def test_reading_changes_nothing_and_reset_forgets():
    state = OrthogonalityStrength(2, interval=3)
    run(state, [constant(0.3, 2)] * 4)
    before = copy.deepcopy(state.state_dict())
    state().zero_()
    assert all(torch.equal(v, before[k]) for k, v in state.state_dict().items())
    state.reset_parameters()
    fresh = OrthogonalityStrength(2, interval=3).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in state.state_dict().items())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"base": -0.1}, "orthogonality_base"),
        ({"base": float("nan")}, "orthogonality_base"),
        ({"decay": 0.0}, "orthogonality_decay"),
        ({"decay": 1.1}, "orthogonality_decay"),
        ({"interval": 0}, "orthogonality_interval"),
        ({"target": 0.0}, "orthogonality_target"),
        ({"target": 1.5}, "orthogonality_target"),
        ({"low": 0.0}, "orthogonality_min"),
        ({"low": -1.0}, "orthogonality_min"),
        ({"low": 0.5, "high": 0.4}, "orthogonality_max"),
    ],
)
def test_wrong_input(options, match):
    with pytest.raises(ConfigError, match=match):
        OrthogonalityStrength(2, **options)
