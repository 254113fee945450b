"""Masks: exact counts, only fewer weights, the same answer to ties, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from graphmoe.errors import CheckpointError, ConfigError, GraphMoEError
from graphmoe.train.lottery import Masks, prunable_weights, require_enforced


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(7, 6), nn.Conv2d(1, 4, 3)
        self.body = nn.ModuleDict({"first": nn.Linear(12, 10), "norm": nn.LayerNorm(10)})
        self.body["second"], self.head = nn.Linear(10, 6), nn.Linear(6, 7)
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.embedding.weight


NAMES = ["conv.weight", "body.first.weight", "body.second.weight", "head.weight"]


def weights():
    return {"a": torch.arange(12.0).view(3, 4) - 6, "b": torch.tensor([[0.5, -9.0], [7.5, 0.25]])}


def full():
    return Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights().items()})


def survivors(values, names, count):
    """The obvious way: sort all entries by magnitude, then by layer and place; the largest of each first."""
    entries = [
        (-abs(value), layer, place)
        for layer, name in enumerate(names)
        for place, value in enumerate(values[name].flatten().tolist())
    ]
    best = [min(entry for entry in entries if entry[1] == layer) for layer in range(len(names))]
    rest = sorted(entry for entry in entries if entry not in best)
    return {(names[layer], place) for _, layer, place in [*best, *rest][:count]}


def existing(masks):
    return {
        (name, place) for name, mask in masks.items() for place in mask.flatten().nonzero()[:, 0].tolist()
    }


def test_what_is_pruned_unless_the_caller_says_otherwise():
    assert prunable_weights(Net()) == NAMES  # no bias, norm, embedding, nor what is tied to one
    assert prunable_weights(Net(), exclude=["head", "body"]) == ["conv.weight"]
    assert prunable_weights(nn.Linear(2, 2)) == ["weight"]
    assert Masks.full(Net()).counts == {name: Net().get_parameter(name).numel() for name in NAMES}
    with pytest.raises(ConfigError, match="no such module"):
        prunable_weights(Net(), exclude=["bod"])
    with pytest.raises(ConfigError, match="nothing to prune"):
        prunable_weights(nn.LayerNorm(3))
    with pytest.raises(ConfigError, match="no such parameter"):
        Masks.full(Net(), ["body.third.weight"])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.8, 0.99])
def test_both_scopes_equal_a_sort(fraction):
    values = weights()
    by_layer = full().prune(values, fraction)
    for name, weight in values.items():
        count = max(1, round((1 - fraction) * weight.numel()))
        kept = {entry for entry in existing(by_layer) if entry[0] == name}
        assert kept == survivors(values, [name], count)
    together = full().prune(values, fraction, scope="global")
    count = max(2, round((1 - fraction) * 16))
    assert existing(together) == survivors(values, ["a", "b"], count) and together.remaining == count


def test_counts_are_exact_over_rounds_and_masks_only_shrink():
    net = Net()
    for scope in ("layer", "global"):
        masks, count = Masks.full(net), dict(Masks.full(net).counts)
        for _ in range(7):
            for parameter in net.parameters():
                nn.init.normal_(parameter)  # weights that were pruned come back, and must not count
            after = masks.prune(net, 0.4, scope=scope, fractions={"head.weight": 0.2})
            assert after.within(masks) and not masks.within(after)
            count["head.weight"] = round(0.8 * count["head.weight"])
            assert after.counts["head.weight"] == count["head.weight"]
            if scope == "layer":
                for name in NAMES[:-1]:
                    count[name] = max(1, round(0.6 * count[name]))
                assert after.counts == count
            else:
                others = masks.remaining - masks.counts["head.weight"]
                assert after.remaining - count["head.weight"] == round(0.6 * others)
            masks = after
        assert masks.total == sum(net.get_parameter(name).numel() for name in NAMES)


def test_ties_go_to_the_first_and_no_layer_becomes_empty():
    values = {"a": torch.ones(2, 3), "b": torch.full((2, 2), 1e-6)}
    masks = Masks({name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()})
    assert masks.prune(values, 0.5)["a"].flatten().tolist() == [True] * 3 + [False] * 3
    least = masks.prune(values, 0.999, scope="global")
    assert least.counts == {"a": 1, "b": 1} and least["b"].flatten().tolist() == [True, False, False, False]
    assert least.prune(values, 0.999).counts == least.counts
    # Weights that exist outlive zeros that do not, even if they are 0 themselves.
    assert least.prune({name: 0 * value for name, value in values.items()}, 0.5).within(least)


def test_random_masks_have_the_counts_of_each_layer_and_are_nested():
    masks = Masks.full(Net()).prune(Net(), 0.5, scope="global")
    other = masks.random(3)
    assert other.counts == masks.counts and not other.within(masks)
    assert existing(other) == existing(masks.random(3)) != existing(masks.random(4))
    fewer = masks.prune(Net(), 0.5).random(3)
    assert fewer.within(other) and fewer.remaining < other.remaining


def test_audit_finds_what_is_planted_in_weights_and_state():
    net = Net()
    masks = Masks.full(net).prune(net, 0.5)
    optimizer = AdamW(net.parameters(), lr=0.1)
    assert sum(masks.outside(net).values()) == masks.total - masks.remaining
    masks.apply_(net)
    require_enforced(masks, net, optimizer)
    pruned = ~masks["body.first.weight"]
    place = tuple(pruned.nonzero()[3])
    with torch.no_grad():
        net.body["first"].weight[place] = 1e-30
    assert masks.outside(net) == dict.fromkeys(NAMES, 0) | {"body.first.weight": 1}
    with pytest.raises(GraphMoEError, match=r"body\.first\.weight: pruned weights are not 0"):
        require_enforced(masks, net)
    with torch.no_grad():
        net.body["first"].weight[place] = 0
    optimizer.state[net.head.weight] = {"exp_avg": torch.ones(7, 6), "step": torch.tensor(1.0)}
    assert masks.outside(net, optimizer)["head.weight"] == 42 - masks.counts["head.weight"]
    assert sum(masks.outside(net).values()) == 0


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1, weight_decay=0.3), lambda p: SGD(p, 0.1, 0.9)])
def test_without_enforcement_an_optimiser_revives_what_was_pruned(make):
    net = Net()
    optimizer = make(net.parameters())
    for _ in range(2):
        net.head(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    masks = Masks.full(net, ["head.weight"]).prune(net, 0.5)
    masks.apply_(net)
    optimizer.zero_grad(set_to_none=False)  # all gradients are 0; momentum is not
    optimizer.step()
    assert masks.outside(net)["head.weight"] == 21


def test_written_and_read(tmp_path):
    masks = full().prune(weights(), 0.4)
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert existing(again) == existing(masks) and repr(again) == repr(masks)
    with pytest.raises(CheckpointError, match="no such file"):
        Masks.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"fraction": 1.0}, "no share of the weights"),
        ({"fraction": -0.1}, "no share of the weights"),
        ({"fraction": float("nan")}, "no share of the weights"),
        ({"fraction": 0.1, "fractions": {"a": 1.5}}, "no share of the weights"),
        ({"fraction": 0.1, "fractions": {"c": 0.5}}, "no such mask"),
        ({"fraction": 0.1, "scope": "universe"}, "unknown scope"),
        ({"fraction": 0.1, "weights": {"a": torch.ones(3, 4)}}, "no such parameter"),
        ({"fraction": 0.1, "weights": {"a": torch.ones(4, 3), "b": torch.ones(2, 2)}}, "another shape"),
    ],
)
def test_what_cannot_be_pruned(options, match):
    with pytest.raises(ConfigError, match=match):
        full().prune(**({"weights": weights()} | options))


def test_masks_that_are_none():
    for masks, match in (
        ({}, "no mask"),
        ({"a": torch.ones(3)}, "not of bools"),
        ({"a": torch.zeros(3, dtype=torch.bool)}, "has no weight"),
    ):
        with pytest.raises(ConfigError, match=match):
            Masks(masks)
    with pytest.raises(GraphMoEError, match="not finite"):
        full().prune(weights() | {"b": torch.full((2, 2), float("nan"))}, 0.5)
    with pytest.raises(ConfigError, match="another shape"):
        Masks({"weight": torch.ones(2, 3, dtype=torch.bool)}).apply_(nn.Linear(2, 2))
