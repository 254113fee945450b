import pytest
import torch

from graphmoe import loss as losses
from graphmoe.errors import ConfigError
from graphmoe.nn import MocaLayer, edge_form
from graphmoe.typing import MemoryState
from tests.contract import assert_eval_changes_nothing, assert_every_parameter_learns, assert_same

OPTIONS = {
    "plain": {},
    "all": {"binding": True, "budget": True, "edge_floor": 0.3},
    "no memory": {"num_slots": 0},
    "no experts": {"num_experts": 1},
    "dense": {"slots_per_token": 6, "k": 4},
    "in turn": {"read_dependent_gate": True, "budget": True, "edge_floor": 0.3},
}


def build(num_slots=6, num_experts=4, **options):
    return MocaLayer(8, num_slots, num_experts, **options)


def inputs(layer):
    x = torch.randn(3, 7, 8, requires_grad=True)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:] = False
    bound = layer.memory is not None and layer.memory.lin_read_key is not None
    return x, {"mask": mask, "key": torch.randn(3, 7, 8) if bound else None}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    out, state, record = layer(x, **options)
    assert out.shape == x.shape
    assert (state is None) is (layer.memory is None) is (record.memory is None)
    assert (record.experts is None) is (name == "no experts")
    assert (record.budget is None) is (layer.budget is None)
    tokens = options["mask"].flatten()
    for figure in (record.usage, record.kept):
        assert not figure[~tokens].any()
        assert (figure[tokens] > 0).all() and (figure <= 1 + 1e-6).all()
    assert_eval_changes_nothing(layer, lambda: layer(x, **options))
    total = out.square().sum()
    if record.budget is not None:
        total = total + losses.budget(record.usage, record.budget, 0.1, record.mask)
    assert_every_parameter_learns(layer, total)


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_are_one_long_sequence_and_nobody_hears_the_future(name, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    whole, last, _ = layer(x, **options)
    first, state, _ = layer(x[:, :3], **{n: None if v is None else v[:, :3] for n, v in options.items()})
    rest = {n: None if v is None else v[:, 3:] for n, v in options.items()}
    second, state, _ = layer(x[:, 3:], state=state, **rest)
    present = options["mask"]
    torch.testing.assert_close(torch.cat([first, second], 1)[present], whole[present], rtol=1e-12, atol=1e-12)
    if last is not None:
        torch.testing.assert_close(state.slots, last.slots, rtol=1e-12, atol=1e-12)


def test_edge_form(double):
    layer = build(**OPTIONS["all"])
    x, options = inputs(layer)

    def slow():
        with edge_form(layer):
            return layer(x, **options)[0]

    assert_same(layer, [x], lambda: layer(x, **options)[0], slow)


def test_without_memory_tokens_are_alone():
    layer = build(num_slots=0)
    x = torch.randn(2, 5, 8)
    together, _, _ = layer(x)
    alone = torch.cat([layer(x[:, t : t + 1])[0] for t in range(5)], dim=1)
    torch.testing.assert_close(together, alone)


def test_the_budget_loss_teaches_both_routers_and_the_budgets():
    layer = build(**OPTIONS["all"])
    x, options = inputs(layer)
    _, _, record = layer(x, **options)
    loss = losses.budget(record.usage, record.budget, 0.3, record.mask)
    found = torch.autograd.grad(
        loss,
        [layer.memory.router.weight, layer.experts.router.weight, layer.budget[2].weight],
    )
    assert all(grad.abs().max() > 0 for grad in found)


def test_training_on_the_budget_loss_alone_leaves_fewer_edges():
    layer = build(num_slots=12, num_experts=6, slots_per_token=3, k=3, budget=True, edge_floor=0.1)
    x = torch.randn(8, 20, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    kept = []
    for _ in range(60):
        _, _, record = layer(x)
        kept.append(float(record.kept.mean()))
        loss = losses.budget(record.usage, record.budget, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert kept[0] > 0.8
    assert kept[-1] < 0.6
    assert float(record.budget.mean()) < 0.9  # from 0.95, towards what is used


def test_wrong_input():
    with pytest.raises(ConfigError, match="edge_floor: no weight an edge may lie under"):
        build(edge_floor=1.0)
    with pytest.raises(ConfigError, match="num_slots: negative number of slots"):
        build(num_slots=-1)
    state = MemoryState(torch.zeros(2, 6, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="state: there is no memory to go on with"):
        build(num_slots=0)(torch.randn(2, 3, 8), state=state)
