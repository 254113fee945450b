import pytest
import torch

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM, MocaConfig, MocaForTokenPrediction
from graphmoe.typing import ANSWERS, ATTENDS, COUPLES, ROUTES, WRITES


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


@pytest.mark.parametrize("experts", [1, 4])
def test_trace_of_a_memory(experts):
    """Slots of each sequence and layer; a token writes and reads its own, with weights that add up."""
    config = GraphMoEConfig(
        vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_experts=experts, num_experts_per_tok=min(experts, 2), num_memory_slots=6,
    )  # fmt: skip
    model = GraphMoEForCausalLM(config)
    data = graphmoe.trace(model, input_ids=torch.randint(31, (3, 5)))
    assert data.validate() and data["slot"].num_nodes == 2 * 3 * 6
    assert data["expert"].num_nodes == (2 * experts if experts > 1 else 0)
    for edge_type, token in ((WRITES, 0), (ANSWERS, 1)):
        edges = data[edge_type]
        tokens, slots = edges.edge_index[token], edges.edge_index[1 - token]
        assert edges.edge_index.size(1) == 2 * 15 * 2
        assert torch.equal(data["slot"].batch[slots], data["token"].batch[tokens])
        assert torch.equal(data["slot"].layer[slots], edges.layer)
        for layer in (0, 1):
            mine = edges.layer == layer
            total = torch.zeros(15).index_add(0, tokens[mine], edges.weight[mine])
            if edge_type == ANSWERS:  # attention of a token sums to 1
                torch.testing.assert_close(total, torch.ones(15))
            else:  # what it writes to its gate
                assert (total > 0).all() and (total < 1).all()


def test_trace_of_slots_and_experts_leaves_padding_out():
    config = MocaConfig(vocab_size=11, hidden_size=16, num_slots=5, num_experts=3, max_position_embeddings=16)
    model = MocaForTokenPrediction(config)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    data = graphmoe.trace(model, input_ids=torch.randint(1, 9, (2, 4)), attention_mask=mask)
    assert data.validate() and data["slot"].num_nodes == 2 * 5
    present = {0, 1, 2, 3, 4, 5}
    for edge_type, token in ((ROUTES, 0), (WRITES, 0), (ANSWERS, 1)):
        assert set(data[edge_type].edge_index[token].tolist()) == present


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
