import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip
from torch.utils.checkpoint import checkpoint

from graphmoe.errors import ConfigError
from graphmoe.graph import complete
from graphmoe.nn import CollabConv, edge_form
from graphmoe.ops import blocks

EXPERTS = 9


def random_ids(tokens, k):
    """Different experts of every token; the first row of the first token and all of the second are absent."""
    ids = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(tokens)])
    ids[0, 0] = EXPERTS
    ids[1] = EXPERTS
    return ids


def edges_of(conv, *args, **kwargs):
    with edge_form(conv):
        return conv(*args, **kwargs)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 500)  # bytes: a few tokens


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("mediator", [False, True])
@pytest.mark.parametrize("graph", ["complete", "self"])
@pytest.mark.parametrize("rounds", [0, 1, 2, 4])
def test_all_forms_are_equal(k, mediator, graph, rounds, monkeypatch, double):
    conv = CollabConv(8, EXPERTS, heads=2, rounds=rounds, hidden_channels=6, mediator=mediator, graph=graph)
    x, level = torch.randn(5, k, 8, requires_grad=True), torch.rand(EXPERTS, requires_grad=True)
    given = {"expert": random_ids(5, k), "level": level}
    edge = lambda: edges_of(conv, x, **given)  # noqa: E731
    assert_same(conv, [x, level], lambda: conv(x, **given), edge, tol=1e-10)
    if graph == "complete":
        edges = complete(k, loops=True)
        assert_same(conv, [x, level], lambda: conv(x, edges, **given), edge, tol=1e-10)
    monkeypatch.setattr(blocks, "BLOCK", 500)
    assert_same(conv, [x, level], lambda: conv(x, **given), edge, tol=1e-10)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("mediator", [False, True])
def test_oracle(mediator, double):
    conv = CollabConv(8, EXPERTS, heads=2, rounds=3, mediator=mediator)
    x, ids, level = torch.randn(5, 3, 8), random_ids(5, 3), torch.rand(EXPERTS)
    out = conv(x, expert=ids, level=level)
    for n in range(5):
        rows = [i for i in range(3) if ids[n, i] < EXPERTS]
        nodes = [x[n, i] for i in rows] + ([conv.mediator] if mediator else [])
        if nodes:
            weight = torch.cat([level[ids[n, rows]], torch.ones(int(mediator))])
            expected = reference.collaborate(
                conv, torch.stack(nodes), weight.expand(len(nodes), -1), rounds=3
            )
            torch.testing.assert_close(out[n, rows + [3] * mediator], expected)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("mediator", [False, True])
def test_absent_rows_influence_nothing(mediator, double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=mediator)
    x, ids = torch.randn(6, 3, 8, requires_grad=True), random_ids(6, 3)
    absent = ids == EXPERTS
    out = conv(x, expert=ids)
    grads = torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])
    assert out[:, :3][absent].eq(0).all() and grads[0][absent].eq(0).all()
    assert all(g.isfinite().all() for g in grads)
    wild = torch.where(absent.unsqueeze(-1), torch.full_like(x, float("nan")), x)
    assert torch.equal(conv(wild, expert=ids), out)
    present = conv(x[:1, 1:], expert=ids[:1, 1:])  # the first token without its absent row
    torch.testing.assert_close(out[:1, 1:], present)


def test_a_silent_expert_is_not_heard(double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=True)
    x, ids, level = torch.randn(5, 3, 8), torch.tensor([[4, 2, 7]] * 5), torch.ones(EXPERTS)
    torch.testing.assert_close(conv(x, expert=ids, level=level), conv(x, expert=ids))
    level[2] = 0.0
    without = conv(x[:, [0, 2]], expert=ids[:, [0, 2]])
    torch.testing.assert_close(conv(x, expert=ids, level=level)[:, [0, 2, 3]], without)
    level[2] = 1e-9  # waking is continuous
    torch.testing.assert_close(conv(x, expert=ids, level=level)[:, [0, 2, 3]], without, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_small_blocks")
def test_rows_have_no_order_and_tokens_do_not_meet(double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=True)
    x, ids = torch.randn(6, 4, 8), random_ids(6, 4)
    out, order = conv(x, expert=ids), torch.tensor([2, 0, 3, 1])
    moved = conv(x[:, order], expert=ids[:, order])
    torch.testing.assert_close(moved, out[:, [*order.tolist(), 4]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv(x[3:4], expert=ids[3:4]), out[3:4], rtol=1e-12, atol=1e-12)


def test_the_mediator_carries_what_rows_cannot_tell_one_another(double):
    conv = CollabConv(8, EXPERTS, heads=2, rounds=2, mediator=True)
    x, apart = torch.randn(2, 8), torch.empty(2, 0, dtype=torch.long)
    other = torch.stack([x[0], x[1] + 1])
    # Only the mediator joins the two nodes: what the second says arrives in the second round.
    moved = [(conv(x, apart, rounds=r)[0] - conv(other, apart, rounds=r)[0]).abs().max() for r in (1, 2)]
    assert moved[0] < 1e-12 < 1e-6 < moved[1]


def test_without_talk_every_row_is_alone(double):
    conv = CollabConv(8, EXPERTS, heads=2, graph="self")
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(conv(x), conv(x.view(15, 1, 8)).view(5, 3, 8))
    assert not torch.allclose(CollabConv(8, EXPERTS, heads=2)(x)[0, 0], conv(x)[0, 0])


def test_weights_of_edges_in_every_form(double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=True)
    x, ids, edges = torch.randn(5, 3, 8), random_ids(5, 3), complete(3, loops=True)
    dense = torch.rand(5, 3, 3) * (torch.rand(5, 3, 3) < 0.7)
    out = conv(x, expert=ids, edge_weight=dense)
    torch.testing.assert_close(conv(x, edges, ids, dense.flatten(1)), out)
    torch.testing.assert_close(edges_of(conv, x, expert=ids, edge_weight=dense), out)
    shared = conv(x, edges, ids, dense[2].flatten())
    torch.testing.assert_close(conv(x, expert=ids, edge_weight=dense[2]), shared)


def test_a_plain_graph_of_the_user(double):
    conv = CollabConv(8, heads=2, mediator=True)
    x, edges = torch.randn(6, 8), torch.tensor([[0, 1, 2, 5, 5], [1, 2, 0, 4, 5]])
    out, (index, alpha) = conv(x, edges, return_attention_weights=True)
    assert out.shape == (7, 8) and index.shape == (2, 5 + 7 + 6) and alpha.shape == (2, 18, 2)
    assert torch.equal(index[:, :5], edges)
    dense = torch.zeros(6, 6)
    dense[edges[1], edges[0]] = 1.0
    torch.testing.assert_close(conv(x, edge_weight=dense), out)
    order = torch.randperm(5)
    torch.testing.assert_close(conv(x, edges[:, order]), out)
    assert torch.equal(conv(x, edges, rounds=0), torch.cat([x, conv.mediator.unsqueeze(0)]))


@pytest.mark.parametrize("mediator", [False, True])
def test_attention_of_every_round(mediator, double):
    conv = CollabConv(8, EXPERTS, heads=2, rounds=3, mediator=mediator)
    x, ids, nodes = torch.randn(5, 3, 8), random_ids(5, 3), 3 + mediator
    out, attention = conv(x, expert=ids, return_attention_weights=True)
    assert attention.shape == (3, 5, 2, nodes, nodes)
    torch.testing.assert_close(conv(x, expert=ids), out)
    present = torch.cat([ids < EXPERTS, torch.ones(5, int(mediator), dtype=torch.bool)], dim=1)
    expected = present.double().view(1, 5, 1, nodes).expand(3, 5, 2, nodes)
    torch.testing.assert_close(attention.sum(-1), expected)  # of an absent target: 0
    assert attention.movedim(-1, 2)[:, ~present].eq(0).all()  # to an absent source: 0
    _, by_edges = edges_of(conv, x, expert=ids, return_attention_weights=True)
    torch.testing.assert_close(by_edges, attention)
    _, none = conv(x, expert=ids, rounds=0, return_attention_weights=True)
    assert none.shape == (0, 5, 2, nodes, nodes)


def test_rounds_can_be_chosen_at_each_call(double):
    conv, x = CollabConv(8, heads=2, rounds=2), torch.randn(5, 3, 8)
    torch.testing.assert_close(conv(conv(x, rounds=1), rounds=1), conv(x))  # weights are shared
    assert torch.equal(conv(x, rounds=0), x)
    with pytest.raises(ConfigError, match="rounds: negative"):
        conv(x, rounds=-1)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("name", ["attention.lin_out", "feed_forward_norm", "attention", "down_proj"])
def test_a_hook_on_a_layer_counts(name, double):
    conv, x = CollabConv(8, heads=2), torch.randn(5, 3, 8)
    plain = conv(x)
    hook = conv.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    shifted = conv(x)
    torch.testing.assert_close(shifted, edges_of(conv, x))
    assert not torch.allclose(shifted, plain)
    hook.remove()
    assert torch.equal(conv(x), plain)


@pytest.mark.usefixtures("_small_blocks")
def test_dropout_autocast_and_half_precision():
    conv, x = CollabConv(8, EXPERTS, heads=2, mediator=True, dropout=0.5), torch.randn(5, 3, 8)
    assert not torch.equal(conv(x), conv(x))
    conv.eval()
    expected = conv(x, expert=random_ids(5, 3).clamp(max=EXPERTS - 1))
    assert torch.equal(conv(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x).float(), expected, rtol=0.1, atol=0.1)
    half = conv.bfloat16()(x.bfloat16(), level=torch.ones(3))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward_pass(reentrant, double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=True)
    x, ids = torch.randn(5, 3, 8, requires_grad=True), random_ids(5, 3)
    whole = torch.autograd.grad(conv(x, expert=ids).square().sum(), [x, *conv.parameters()])
    checkpoint(lambda t: conv(t, expert=ids), x, use_reentrant=reentrant).square().sum().backward()
    for found, expected in zip([x, *conv.parameters()], whole, strict=True):
        torch.testing.assert_close(found.grad, expected)


def test_compiles_whole(double):
    conv = CollabConv(8, EXPERTS, heads=2, mediator=True)
    x, ids, level = torch.randn(4, 3, 8, requires_grad=True), random_ids(4, 3), torch.rand(EXPERTS)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    given = {"expert": ids, "level": level}
    assert_same(conv, [x], lambda: conv(x, **given), lambda: compiled(x, **given), tol=1e-10)


def test_contract():
    conv, x = CollabConv(8, EXPERTS, heads=2, mediator=True), torch.randn(5, 3, 8)
    assert_every_parameter_learns(conv, conv(x).square().sum())
    fresh = CollabConv(8, EXPERTS, heads=2, mediator=True)
    assert_state_round_trip(conv, fresh, lambda m: m(x))
    assert sorted(conv.state_dict()) == [
        "attention.lin_out.weight",
        "attention.lin_qkv.weight",
        "attention_norm.weight",
        "down_proj.weight",
        "feed_forward_norm.weight",
        "gate_up_proj.weight",
        "mediator",
    ]
    assert conv.connections() is None
    assert repr(conv) == "CollabConv(8, num_experts=9, heads=2, rounds=2, mediator=True)"
    std = CollabConv(4096, heads=2, hidden_channels=1, mediator=True).mediator.std()
    assert 0.018 < std < 0.022


@pytest.mark.parametrize(
    "options, match",
    [
        ({"heads": 3}, "heads must divide"),
        ({"rounds": -1}, "rounds: negative"),
        ({"graph": "ring"}, "graph: unknown graph; expected one of complete, self; got 'ring'"),
        ({"hidden_channels": 0}, "hidden_channels: too few"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ConfigError, match=match):
        CollabConv(8, EXPERTS, **options)
