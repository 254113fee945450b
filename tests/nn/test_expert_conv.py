import pytest
import reference
import torch
from contract import assert_same

from graphmoe.errors import ConfigError
from graphmoe.nn import ExpertConv, TopKRouter, edge_form


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("num_tokens, num_experts, k", [(1, 1, 1), (7, 3, 2), (5, 9, 1), (0, 4, 2)])
def test_edge_form_equals_fast_form(activation, num_tokens, num_experts, k, double):
    conv = ExpertConv(6, 10, num_experts, activation=activation)
    x = torch.randn(num_tokens, 6, requires_grad=True)
    r = TopKRouter(6, num_experts, k)(x.detach(), mask=torch.arange(num_tokens) != 3)
    edges = torch.stack([r.token, torch.arange(len(r.token))])

    def edge():
        with edge_form(conv):
            return conv(x, edges, r.expert, r.ptr)

    assert_same(conv, [x], lambda: conv(x, edges, r.expert, r.ptr), edge)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_oracle(activation, double):
    conv = ExpertConv(4, 3, 2, activation=activation)
    x = torch.randn(3, 4)
    expert = torch.tensor([1, 0, 2, 1])  # row 2 is absent
    out = conv(x, torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]]), expert)
    for row, token in ((0, 0), (1, 1), (3, 2)):
        e = expert[row]
        want = reference.expert(x[token], conv.gate_up_proj[e], conv.down_proj[e], activation)
        torch.testing.assert_close(out[row], want)
    assert (out[2] == 0).all()


def test_edge_order_does_not_matter(double):
    conv = ExpertConv(4, 3, 2)
    x, expert = torch.randn(3, 4), torch.tensor([0, 1, 1])
    edges = torch.tensor([[0, 1, 2], [0, 1, 2]])
    torch.testing.assert_close(conv(x, edges, expert), conv(x, edges[:, [2, 0, 1]], expert))


def test_bad_activation():
    with pytest.raises(
        ConfigError, match=r"activation: unknown activation; expected one of swiglu, gelu; got 'relu'"
    ):
        ExpertConv(4, 3, 2, activation="relu")
    assert repr(ExpertConv(4, 3, 2)) == "ExpertConv(4, hidden_channels=3, num_experts=2, activation='swiglu')"
