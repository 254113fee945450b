import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.nn import MemoryBank
from tests.contract import assert_every_parameter_learns


def test_every_sequence_starts_with_the_learned_slots():
    bank = MemoryBank(500, 40)
    slots = bank(3)
    assert slots.shape == (3, 500, 40)
    assert torch.equal(slots[0], slots[2])
    assert abs(float(bank.slots.detach().std()) - 0.02) < 1e-3
    assert repr(bank) == "MemoryBank(500, 40)"
    assert_every_parameter_learns(bank, slots.square().sum())
    assert bank(0).shape == (0, 500, 40)


def test_wrong_input():
    with pytest.raises(ConfigError, match="num_slots: a memory needs room; expected at least 1; got 0"):
        MemoryBank(0, 4)
    with pytest.raises(ConfigError, match="channels: a memory needs room"):
        MemoryBank(4, 0)
