import pytest
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import GraphError
from graphmoe.nn import edge_form
from graphmoe.nn.memory.recall_conv import RecallConv


def build() -> RecallConv:
    conv = RecallConv(6, 5)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return conv


def memories():
    """Two memories of four slots and three tokens; one edge has weight 0, one token no edge."""
    key, token = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    value, weight = torch.randn(2, 4, 7, requires_grad=True), torch.rand(2, 4)
    mask = torch.rand(2, 3, 4) < 0.7
    mask[0, 1], mask[1, 0, 2], weight[0, 3] = False, True, 0.0
    return key, token, value, weight.requires_grad_(), mask


def test_fast_form_equals_edge_form_and_a_double_loop(double):
    conv = build()
    key, token, value, weight, mask = memories()

    def fast():
        return conv((key, token), value, edge_weight=weight, mask=mask)

    def edge():
        with edge_form(conv):
            return fast()

    def loop():
        out = []
        for b in range(2):
            for t in range(3):
                slots = [s for s in range(4) if mask[b, t, s] and weight[b, s] > 0]
                query = conv.lin_query.weight @ token[b, t]
                score = [
                    weight[b, s].log()
                    - conv.log_temperature.exp() * (query - key[b, s]).pow(2).sum() / 5**0.5
                    for s in slots
                ]
                share = torch.stack(score).softmax(0) if slots else []
                out.append(sum((a * value[b, s] for a, s in zip(share, slots, strict=True)), torch.zeros(7)))
        return torch.stack(out).view(2, 3, 7)

    inputs = [key, token, value, weight]
    assert_same(conv, inputs, fast, edge, tol=1e-10)
    assert_same(conv, inputs, fast, loop, tol=1e-10)
    assert (fast()[0, 1] == 0).all()


def test_attention_is_that_of_the_edges(double):
    conv = build()
    key, token, value, weight, mask = memories()
    _, fast = conv((key, token), value, edge_weight=weight, mask=mask, return_attention_weights=True)
    with edge_form(conv):
        _, edge = conv((key, token), value, edge_weight=weight, mask=mask, return_attention_weights=True)
    torch.testing.assert_close(fast, edge)
    assert (fast[~mask] == 0).all()
    has_edges = (mask & (weight > 0).unsqueeze(1)).any(-1)
    torch.testing.assert_close(fast.sum(-1), has_edges.to(fast.dtype))


def test_on_any_edges_in_any_order(double):
    conv, key, token = build(), torch.randn(4, 5), torch.randn(3, 6)
    value, weight = torch.randn(4, 2), torch.rand(5)
    edges = torch.tensor([[0, 3, 1, 2, 0], [1, 1, 0, 1, 0]])
    order = torch.tensor([4, 2, 0, 1, 3])
    out, (_, alpha) = conv((key, token), value, edges, weight, return_attention_weights=True)
    torch.testing.assert_close(out, conv((key, token), value, edges[:, order], weight[order]))
    torch.testing.assert_close(alpha[[2, 4]].sum(), torch.tensor(1.0))
    assert (out[2] == 0).all()


def test_a_sharp_temperature_recalls_the_nearest_value(double):
    conv, key = RecallConv(3, 3), torch.randn(1, 6, 3)
    torch.nn.init.constant_(conv.log_temperature, 12.0)
    value = torch.eye(6).unsqueeze(0)
    out = conv((key, key + 1e-2), value, mask=torch.ones(1, 6, 6, dtype=torch.bool))
    torch.testing.assert_close(out, value)


def test_contract():
    conv = build()
    key, token, value, weight, mask = memories()
    call = lambda c: c((key, token), value, edge_weight=weight, mask=mask)  # noqa: E731
    assert_every_parameter_learns(conv, call(conv).square().sum())
    assert_state_round_trip(conv, build(), call)
    assert repr(conv) == "RecallConv(6, 5)"
    empty = conv((key[:, :0], token), value[:, :0], mask=mask[:, :, :0])
    assert empty.shape == (2, 3, 7) and (empty == 0).all()


def test_wrong_input():
    conv = build()
    key, token, value, _, mask = memories()
    with pytest.raises(GraphError, match=r"x: slots answer tokens; expected a pair"):
        conv(token, value, mask=mask)
    with pytest.raises(GraphError, match=r"mask: which slots .* expected \(2, 3, 4\)"):
        conv((key, token), value)
    with pytest.raises(GraphError, match=r"source id out of range"):
        conv((key[0], token[0]), value[0], torch.tensor([[4], [0]]))
