import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import ConfigError
from graphmoe.graph import complete
from graphmoe.nn import RowAttention, edge_form
from graphmoe.ops import blocks


def edges_of(conv, *args, **kwargs):
    with edge_form(conv):
        return conv(*args, **kwargs)


def some_edges(tokens, nodes):
    weight = torch.rand(tokens, nodes, nodes) * (torch.rand(tokens, nodes, nodes) < 0.7)
    weight[0, 0] = 0.0  # hears nobody
    return weight


@pytest.mark.parametrize("nodes", [1, 3, 6])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_edge_form_equals_dense_forms(nodes, weighted, in_blocks, monkeypatch, double):
    monkeypatch.setattr(blocks, "BLOCK", 1000 if in_blocks else 1 << 20)
    conv = RowAttention(8, 2)
    x = torch.randn(5, nodes, 8, requires_grad=True)
    weight = some_edges(5, nodes).requires_grad_() if weighted else None
    inputs = [x, weight] if weighted else [x]
    assert_same(
        conv,
        inputs,
        lambda: conv(x, edge_weight=weight),
        lambda: edges_of(conv, x, edge_weight=weight),
        tol=1e-10,
    )


def test_oracle(double):
    conv, x, weight = RowAttention(8, 2), torch.randn(5, 3, 8), some_edges(5, 3)
    out = conv(x, edge_weight=weight)
    for n in range(5):
        heard = reference.row_attention(x[n] @ conv.lin_qkv.weight.T, 2, weight[n])
        torch.testing.assert_close(out[n], heard @ conv.lin_out.weight.T)


def test_users_graph_in_any_order_of_edges(double):
    conv, x, edges = RowAttention(8, 2), torch.randn(6, 8), complete(6, loops=True)
    shuffled = edges[:, torch.randperm(edges.size(1))]
    torch.testing.assert_close(conv(x, shuffled), conv(x))
    weight = some_edges(1, 6)[0]
    by_edge = weight[shuffled[1], shuffled[0]]
    torch.testing.assert_close(conv(x, shuffled, by_edge), conv(x, edge_weight=weight))
    kept = shuffled[:, by_edge > 0]  # an edge of weight 0 is no edge
    torch.testing.assert_close(conv(x, kept, by_edge[by_edge > 0]), conv(x, edge_weight=weight))


def test_a_node_without_edges_hears_nothing(double):
    conv, x = RowAttention(8, 2), torch.randn(4, 8, requires_grad=True)
    for weight in (torch.zeros(4, 4), None):
        out = conv(x, edge_weight=weight) if weight is not None else conv(x, complete(4)[:, :0])
        assert torch.equal(out, torch.zeros(4, 8))
        (grad,) = torch.autograd.grad(out.square().sum() + x.sum(), x)
        assert torch.equal(grad, torch.ones(4, 8))


def test_attention_weights_are_those_of_the_pass(double):
    conv, x, weight = RowAttention(8, 2), torch.randn(5, 3, 8), some_edges(5, 3)
    out, alpha = conv(x, edge_weight=weight, return_attention_weights=True)
    torch.testing.assert_close(out, conv(x, edge_weight=weight))
    _, by_edge_form = edges_of(conv, x, edge_weight=weight, return_attention_weights=True)
    assert alpha.shape == (5, 2, 3, 3)
    torch.testing.assert_close(by_edge_form, alpha)
    value = conv.lin_qkv(x).chunk(3, dim=-1)[2].view(5, 3, 2, 4)
    heard = torch.einsum("nhij,njhd->nihd", alpha, value).flatten(2)
    torch.testing.assert_close(conv.lin_out(heard), out)
    edges = complete(3, loops=True)
    _, (index, per_edge) = conv(x, edges, weight.flatten(1), return_attention_weights=True)
    assert torch.equal(index, edges) and per_edge.shape == (5, 9, 2)
    torch.testing.assert_close(per_edge, alpha.permute(0, 2, 3, 1).flatten(1, 2))


def test_nodes_have_no_order(double):
    conv, x, weight = RowAttention(8, 2), torch.randn(5, 4, 8), some_edges(5, 4)
    order = torch.tensor([2, 0, 3, 1])
    moved = conv(x[:, order], edge_weight=weight[:, order][:, :, order])
    torch.testing.assert_close(moved, conv(x, edge_weight=weight)[:, order])


def test_tokens_do_not_meet(double):
    conv, x = RowAttention(8, 2), torch.randn(5, 3, 8)
    torch.testing.assert_close(conv(x)[2], conv(x[2]))


def test_dropout_is_for_training_and_returns_whole_weights():
    conv, x = RowAttention(8, 2, dropout=0.5), torch.randn(50, 3, 8)
    assert not torch.equal(conv(x), conv(x))
    _, alpha = conv(x, return_attention_weights=True)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(50, 2, 3))
    conv.eval()
    assert torch.equal(conv(x), conv(x))


def test_compiles_whole(double):
    conv, x, weight = RowAttention(8, 2), torch.randn(4, 3, 8, requires_grad=True), some_edges(4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_same(conv, [x], lambda: conv(x, edge_weight=weight), lambda: compiled(x, edge_weight=weight))


def test_contract():
    conv, x = RowAttention(8, 2), torch.randn(5, 3, 8)
    assert_every_parameter_learns(conv, conv(x).square().sum())
    assert_state_round_trip(conv, RowAttention(8, 2), lambda m: m(x))
    assert repr(conv) == "RowAttention(8, heads=2)"
    for heads in (0, 3):
        with pytest.raises(ConfigError, match="heads: heads must divide the channels"):
            RowAttention(8, heads)
