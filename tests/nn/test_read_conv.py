import pytest
import torch

from graphmoe.errors import ConfigError, GraphError
from graphmoe.nn import ReadConv, edge_form
from tests.contract import assert_every_parameter_learns, assert_same


def graph():
    """Five tokens, of which the last has no edge, and four slots."""
    edges = torch.tensor([[0, 1, 3, 2, 0, 1, 2], [0, 0, 0, 1, 2, 2, 3]])
    weight = torch.tensor([0.5, 0.2, 0.3, 1.0, 0.9, 0.1, 0.7])
    return torch.randn(4, 6), torch.randn(5, 3), edges, weight


def by_hand(conv, slot, token, edges, weight):
    """One head, one token and one slot at a time."""
    d = conv.head_channels
    query, key, value = (
        lin(x).view(len(x), conv.heads, d)
        for lin, x in ((conv.lin_query, token), (conv.lin_key, slot), (conv.lin_value, slot))
    )
    out = torch.zeros(len(token), conv.heads, d)
    for n in range(len(token)):
        mine = [m for m in range(edges.size(1)) if edges[1, m] == n]
        for h in range(conv.heads):
            power = {m: weight[m] * (query[n, h] @ key[edges[0, m], h] / d**0.5).exp() for m in mine}
            for m in mine:
                share = power[m] / sum(power.values())
                out[n, h] = out[n, h] + share * value[edges[0, m], h]
    return out.flatten(1)


def test_equals_the_formula(double):
    conv = ReadConv((6, 3), 8, heads=2)
    slot, token, edges, weight = graph()
    for t in (slot, token, weight):
        t.requires_grad_()
    assert_same(
        conv,
        [slot, token, weight],
        lambda: conv((slot, token), edges, weight),
        lambda: by_hand(conv, slot, token, edges, weight),
    )
    assert repr(conv) == "ReadConv((6, 3), 8, heads=2)"


def test_contract():
    conv = ReadConv((6, 3), 8, heads=2)
    slot, token, edges, weight = graph()
    out, (same, alpha) = conv((slot, token), edges, weight, True)
    assert out.shape == (5, 8) and torch.equal(same, edges) and alpha.shape == (7, 2)
    assert not out[4].any()
    total = torch.zeros(5, 2).index_add(0, edges[1], alpha)
    torch.testing.assert_close(total[:4], torch.ones(4, 2))
    perm = torch.randperm(7)
    torch.testing.assert_close(conv((slot, token), edges[:, perm], weight[perm]), out)
    assert_every_parameter_learns(conv, out.square().sum())
    assert conv((slot, token), edges[:, :0]).abs().max() == 0


def test_an_edge_of_weight_0_is_none(double):
    conv = ReadConv((6, 3), 8, heads=2)
    slot, token, edges, weight = graph()
    weight[[1, 3]] = 0
    keep = weight > 0
    want = conv((slot, token), edges[:, keep], weight[keep])
    assert torch.equal(conv((slot, token), edges, weight)[1], torch.zeros(8))
    torch.testing.assert_close(conv((slot, token), edges, weight), want)


@pytest.mark.parametrize("tokens, k", [(5, 2), (1, 1), (0, 2), (3, 0)])
@pytest.mark.parametrize("weighted", [True, False])
def test_fast_form_is_the_edge_form(tokens, k, weighted, double):
    conv = ReadConv(6, 8)
    slot, token = torch.randn(tokens, k, 6, requires_grad=True), torch.randn(tokens, 6, requires_grad=True)
    weight = torch.rand(tokens, k) if weighted else None
    if weighted and tokens == 5:
        weight[0, 0] = weight[2, 0] = weight[2, 1] = 0

    def slow():
        with edge_form(conv):
            return conv((slot, token), edge_weight=weight)

    assert_same(conv, [slot, token], lambda: conv((slot, token), edge_weight=weight), slow)
    _, alpha = conv((slot, token), edge_weight=weight, return_attention_weights=True)
    with edge_form(conv):
        _, other = conv((slot, token), edge_weight=weight, return_attention_weights=True)
    torch.testing.assert_close(alpha, other)


def test_wrong_input():
    with pytest.raises(ConfigError, match="heads: heads must divide the channels; expected a divisor of 8"):
        ReadConv(4, 8, heads=3)
    conv = ReadConv(4, 8)
    with pytest.raises(GraphError, match="x: slots answer tokens"):
        conv(torch.randn(3, 4), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(GraphError, match="source id out of range"):
        conv((torch.randn(3, 4), torch.randn(2, 4)), torch.tensor([[3], [0]]))
    with pytest.raises(GraphError, match=r"x_slot: not the slots of each token.*\[2, k, F\]"):
        conv((torch.randn(3, 4), torch.randn(2, 4)))
