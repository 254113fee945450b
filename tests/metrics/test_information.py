import math

import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError, GraphError


def information_by_hand(expert, token_class):
    total, bits = len(expert), 0.0
    for e in set(expert):
        for c in set(token_class):
            joint = sum(x == e and y == c for x, y in zip(expert, token_class, strict=True)) / total
            if joint:
                bits += joint * math.log2(joint / (expert.count(e) / total * token_class.count(c) / total))
    return bits


def test_mutual_information_by_hand():
    expert = torch.randint(4, (200,))
    token_class = (expert * torch.randint(2, (200,))).clamp(max=2)
    want = information_by_hand(expert.tolist(), token_class.tolist())
    assert want > 0.1
    assert metrics.mutual_information(expert, token_class, 4, 3).item() == pytest.approx(want, rel=1e-9)
    # Absent edges (expert 4 of 4) do not count.
    more = torch.cat([expert, torch.full((50,), 4)]), torch.cat([token_class, torch.zeros(50).long()])
    assert metrics.mutual_information(*more, 4, 3).item() == pytest.approx(want, rel=1e-9)


def test_mutual_information_of_fixed_and_constant_routing():
    token_class = torch.arange(8).repeat(50)
    assert metrics.mutual_information(token_class % 4, token_class, 4, 8).item() == pytest.approx(2)
    assert metrics.mutual_information(torch.zeros(400).long(), token_class, 4, 8).item() == 0
    empty = torch.zeros(0, dtype=torch.long)
    assert metrics.mutual_information(empty, empty, 4, 8).item() == 0
    assert metrics.shuffled_mutual_information(empty, empty, 4, 8).item() == 0


def test_shuffling_gives_the_bias_of_routing_that_ignores_the_class():
    expert, token_class = torch.randint(4, (300,)), torch.randint(40, (300,))
    plain = metrics.mutual_information(expert, token_class, 4, 40).item()
    shuffled = metrics.shuffled_mutual_information(expert, token_class, 4, 40).item()
    assert plain > 0.15  # a plug-in estimate finds information where there is none ...
    assert shuffled == pytest.approx(plain, rel=0.2)  # ... and shuffling says how much
    fixed = token_class % 4
    assert metrics.mutual_information(fixed, token_class, 4, 40).item() > 4 * shuffled


def test_shuffling_repeats_itself_and_leaves_absent_edges_out():
    expert, token_class = torch.randint(4, (100,)), torch.randint(9, (100,))
    before = torch.get_rng_state()
    first = metrics.shuffled_mutual_information(expert, token_class, 4, 9)
    assert metrics.shuffled_mutual_information(expert, token_class, 4, 9) == first
    assert metrics.shuffled_mutual_information(expert, token_class, 4, 9, seed=3) != first
    more = torch.cat([expert, torch.full((30,), 4)]), torch.cat([token_class, torch.zeros(30).long()])
    assert metrics.shuffled_mutual_information(*more, 4, 9) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_input():
    ids = torch.arange(3)
    with pytest.raises(GraphError, match="token_class: one class an edge"):
        metrics.mutual_information(ids, ids[:2], 3, 3)
    with pytest.raises(GraphError, match="token_class: id out of range"):
        metrics.shuffled_mutual_information(ids, ids, 3, 2)
    with pytest.raises(GraphError, match="expert: id out of range"):
        metrics.mutual_information(ids, ids, 1, 3)
    with pytest.raises(ConfigError, match="samples"):
        metrics.shuffled_mutual_information(ids, ids, 3, 3, samples=0)
