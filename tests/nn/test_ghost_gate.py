import copy

import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.nn import GhostGate
from graphmoe.typing import NEVER

SERVED = torch.ones(4, dtype=torch.long)


def spread_out():
    """Orthogonal experts that leave variance 2 unexplained: saturation 2 with full specialisation."""
    return torch.eye(4)[:, :4], SERVED * torch.tensor([1, 1, 0, 0]), torch.tensor(2.0)


def test_starts_dormant_and_unreachable():
    gate = GhostGate(4, 4, 2)
    assert gate().tolist() == [1, 1, 0, 0]
    assert gate.offset().tolist() == [0, 0, NEVER, NEVER]
    assert gate.saturation() == 0


def test_life_of_two_ghosts():
    gate = GhostGate(4, 4, 2, threshold=0.5, rate=0.01, window=10)
    phases = []
    for _ in range(240):
        gate.observe(*spread_out())
        phases.append(gate.phase.tolist())
    woke = phases.index([1, 0]) + 1
    assert woke == 10  # a full window, no sooner
    # 100 steps of 0.01 make exactly 1; only then comes the next, whose window had long passed.
    assert phases.index([2, 1]) + 1 == woke + 100
    assert all(phase.count(1) <= 1 for phase in phases)
    assert phases[-1] == [2, 2]
    assert gate().tolist() == [1, 1, 1, 1]
    assert gate.offset().tolist() == [0, 0, 0, 0]


def test_next_ghost_waits_for_a_window():
    gate = GhostGate(4, 4, 2, threshold=0.5, rate=1.0, window=30)
    wakes = []
    for step in range(1, 100):
        before = gate.phase.clone()
        gate.observe(*spread_out())
        if ((before == 0) & (gate.phase == 1)).any():
            wakes.append(step)
    assert wakes == [30, 60]


def test_level_and_logit_offset_grow_together():
    gate = GhostGate(4, 4, 2, threshold=0.5, rate=0.25, window=1)
    levels = []
    for _ in range(5):
        gate.observe(*spread_out())
        levels.append(gate()[2].item())
    assert levels == [0, 0.25, 0.5, 0.75, 1]
    gate.steps[0] = 2
    torch.testing.assert_close(gate.offset()[2].exp(), torch.tensor(0.5))


def test_stays_dormant_below_threshold_and_after_saturation_falls_stays_awake():
    gate = GhostGate(4, 4, 1, threshold=5.0, window=5)
    for _ in range(50):
        gate.observe(*spread_out())
    assert gate.phase.tolist() == [0]
    gate.threshold = 0.5
    gate.observe(*spread_out())
    assert gate.phase.tolist() == [1]
    for _ in range(20):
        gate.observe(torch.ones(4, 4), SERVED, torch.tensor(0.0))
    assert gate.phase.tolist() == [1]
    gate.reset_ghost(0)
    assert gate().tolist() == [1, 1, 1, 0]


def test_saturation_by_hand():
    gate = GhostGate(2, 3, 1, window=4)
    mean = torch.tensor([[3.0, 0.0], [4.0, 4.0], [9.0, 9.0]])
    for _ in range(3):  # constant input: the corrected averages are the input
        gate.observe(mean, torch.tensor([5, 7, 0]), torch.tensor(0.8))
    # cosine 1/sqrt2 between the two live experts: squared errors 0, 1/2, 1/2, 0 over 4 pairs
    assert gate.saturation().item() == pytest.approx((1 - 0.25) * 0.8, rel=1e-5)


def test_state_round_trip_in_the_middle_of_activation():
    gate = GhostGate(4, 4, 2, threshold=0.5, window=10)
    for _ in range(47):
        gate.observe(*spread_out())
    fresh = GhostGate(4, 4, 2, threshold=0.5, window=10)
    fresh.load_state_dict(copy.deepcopy(gate.state_dict()))
    for _ in range(100):
        gate.observe(*spread_out())
        fresh.observe(*spread_out())
        assert all(torch.equal(a, b) for a, b in zip(gate.buffers(), fresh.buffers(), strict=True))
    assert gate.phase.tolist() == [2, 1]


def test_reading_changes_nothing():
    gate = GhostGate(4, 4, 2)
    before = copy.deepcopy(gate.state_dict())
    for _ in range(3):
        gate(), gate.offset(), gate.saturation()
    assert all(torch.equal(v, before[k]) for k, v in gate.state_dict().items())


def test_levels_survive_a_cast():
    gate = GhostGate(4, 4, 2, rate=0.01)
    gate.phase[0], gate.steps[0] = 1, 37
    assert gate.bfloat16()()[2].item() == pytest.approx(0.37)


def test_a_rate_too_small_to_ever_arrive():
    gate = GhostGate(4, 4, 1, threshold=0.5, rate=1e-300, window=1)
    for _ in range(3):
        gate.observe(*spread_out())
    assert gate.phase.tolist() == [1] and gate()[3] == 0


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_ghosts": 4}, "num_ghosts: no primary"),
        ({"num_ghosts": 0}, "num_ghosts: no primary"),
        ({"num_ghosts": -1}, "num_ghosts: no primary.*got -1"),
        ({"rate": 0.0}, "ghost_rate: level per step.*got 0.0"),
        ({"rate": -1.0}, "ghost_rate: level per step.*got -1.0"),
        ({"rate": 1.001}, "ghost_rate: level per step.*got 1.001"),
        ({"rate": float("nan")}, "ghost_rate: level per step.*got nan"),
        ({"window": 0}, "ghost_window: window.*got 0"),
        ({"window": -5}, "ghost_window: window.*got -5"),
        ({"window": 2.5}, "ghost_window: window.*got 2.5"),
        ({"window": float("nan")}, "ghost_window: window.*got nan"),
        ({"threshold": -0.1}, "ghost_activation_threshold: threshold.*got -0.1"),
        ({"threshold": float("nan")}, "ghost_activation_threshold: threshold.*got nan"),
    ],
    ids=str,
)
def test_wrong_input(options, match):
    with pytest.raises(ConfigError, match=match):
        GhostGate(4, 4, **{"num_ghosts": 2, **options})
