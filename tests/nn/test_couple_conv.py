import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same

from graphmoe.graph import complete
from graphmoe.nn import CoupleConv, edge_form


def random_ids(num_tokens, k, num_experts):
    return torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])


@pytest.mark.parametrize("k, num_experts", [(1, 3), (3, 3), (3, 7)])
@pytest.mark.parametrize("with_level", [False, True])
def test_edge_form_equals_fast_form(k, num_experts, with_level, double):
    conv = CoupleConv(5, num_experts)
    x = torch.randn(4, k, 5, requires_grad=True)
    ids = random_ids(4, k, num_experts)
    ids[1, 0] = num_experts
    level = torch.rand(num_experts) if with_level else None

    def edge():
        with edge_form(conv):
            return conv(x, expert=ids, level=level)

    assert_same(conv, [x], lambda: conv(x, expert=ids, level=level), edge)


def test_oracle(double):
    conv = CoupleConv(5, 6)
    x, ids = torch.randn(4, 3, 5), random_ids(4, 3, 6)
    out = conv(x, expert=ids)
    for n in range(4):
        torch.testing.assert_close(out[n], reference.gnn_couple(conv, x[n], ids[n].tolist()))


def test_absent_rows_neither_speak_nor_listen(double):
    conv = CoupleConv(5, 6)
    x, ids = torch.randn(1, 3, 5), torch.tensor([[4, 6, 1]])
    out = conv(x, expert=ids)
    without = conv(x[:, [0, 2]], expert=ids[:, [0, 2]])
    torch.testing.assert_close(out[:, [0, 2]], without)


def test_user_graph_equals_dense_and_ignores_edge_order(double):
    conv = CoupleConv(5)
    x = torch.randn(6, 5)
    edges = complete(6)
    shuffled = edges[:, torch.randperm(edges.size(1))]
    torch.testing.assert_close(conv(x, shuffled), conv(x))
    weight = torch.rand(6, 6)
    torch.testing.assert_close(
        conv(x, edges, edge_weight=weight[edges[1], edges[0]]), conv(x, edge_weight=weight)
    )
    assert conv(x, edges[:, :0]).shape == x.shape
    _, (index, gates) = conv(x, edges, return_attention_weights=True)
    assert torch.equal(index, edges) and gates.shape == (30,) and ((gates > 0) & (gates < 1)).all()


def test_an_adapter_or_hook_on_a_linear_layer_counts(double):
    conv = CoupleConv(5, 4)
    x = torch.randn(2, 4, 5)
    plain = conv(x)
    hook = conv.lin_self.register_forward_hook(lambda module, args, out: out + 1)
    shifted = conv(x)
    with edge_form(conv):
        torch.testing.assert_close(shifted, conv(x))
    assert not torch.allclose(shifted, plain)
    hook.remove()
    assert torch.equal(conv(x), plain)


@pytest.mark.parametrize("k", [3, 5])
def test_compiles_whole(k, double):
    conv = CoupleConv(5, 5)
    x, ids = torch.randn(4, k, 5, requires_grad=True), None if k == 5 else random_ids(4, k, 5)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_same(conv, [x], lambda: conv(x, expert=ids), lambda: compiled(x, expert=ids))


def test_starts_half_open_and_everything_learns():
    conv = CoupleConv(8, 4)
    off_diagonal = conv.connections()[~torch.eye(4, dtype=torch.bool)]
    assert (off_diagonal - 0.5).abs().max() < 0.05
    assert_every_parameter_learns(conv, conv(torch.randn(5, 4, 8)).square().sum())
    assert repr(conv) == "CoupleConv(8, num_experts=4)"
