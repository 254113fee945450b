import pytest
import torch

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM
from graphmoe.typing import ATTENDS, COUPLES, ROUTES


def test_trace_of_a_language_model():
    config = GraphMoEConfig(
        vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_experts=4, num_experts_per_tok=3, coupling="hyper", num_ghosts=1,
    )  # fmt: skip
    model = GraphMoEForCausalLM(config).train()
    data = graphmoe.trace(model, input_ids=torch.randint(31, (2, 5)))
    assert data.validate()
    assert model.training
    assert data["token"].num_nodes == 10 and data["expert"].num_nodes == 2 * 5
    routes = data[ROUTES]
    assert routes.edge_index.size(1) == 2 * 10 * 3
    assert torch.equal(routes.edge_index[1] // 5, routes.layer)
    for layer in (0, 1):  # weights of a token sum to 1
        mine = routes.layer == layer
        total = torch.zeros(10).index_add(0, routes.edge_index[0, mine], routes.weight[mine])
        torch.testing.assert_close(total, torch.ones(10))
    attends = data[ATTENDS]
    assert attends.edge_index.size(1) == 2 * 2 * 15
    assert (attends.edge_index[0] <= attends.edge_index[1]).all()
    total = torch.zeros(10).index_add(0, attends.edge_index[1], attends.weight)
    torch.testing.assert_close(total, torch.full((10,), 2.0))
    couples = data[COUPLES]
    asleep = data["expert"].level == 0
    assert asleep.sum() == 2
    assert not asleep[couples.edge_index].any() and (couples.weight > 0).all()


def test_trace_of_collaborating_experts():
    """Who heard whom, from the attention at the tokens where both served."""
    config = GraphMoEConfig(
        vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_experts=4, coupling="collab", fusion="gated", reasoning_steps=2,
    )  # fmt: skip
    model = GraphMoEForCausalLM(config).eval()
    ids = torch.randint(31, (2, 9))
    data = graphmoe.trace(model, input_ids=ids)
    assert data.validate() and not any(layer.track_attention for layer in model.moe_layers())
    model.moe_layers()[1].track_attention = True
    record = model(ids, output_records=True).records[1]
    slots = torch.empty_like(record.routing.expert).scatter_(0, record.routing.perm, record.routing.expert)
    slots = slots.view(-1, 2)
    couples = data[COUPLES]
    mine = couples.layer == 1
    pairs = list(zip(*(couples.edge_index[:, mine] - 4).tolist(), couples.weight[mine].tolist(), strict=True))
    assert {p[:2] for p in pairs} >= {(a, b) for a, b in slots.tolist()}
    for source, target, weight in pairs:
        seen = [
            record.attention[:, n, :, i, j].mean()
            for n in range(18) for i in range(2) for j in range(2)
            if slots[n, i] == target and slots[n, j] == source
        ]  # fmt: skip
        assert weight == pytest.approx(torch.stack(seen).mean().item(), rel=1e-4)


def test_nothing_to_trace():
    with pytest.raises(ConfigError, match=r"nothing to trace.*got 'Linear'"):
        graphmoe.trace(torch.nn.Linear(2, 2))
