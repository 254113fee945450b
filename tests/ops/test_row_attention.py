import pytest
import reference
import torch
from contract import assert_same
from torch import nn

from graphmoe.ops import blocks
from graphmoe.ops.row_attention import row_attention

HEADS, CHANNELS = 2, 6


def obvious(qkv, weight=None):
    nodes = qkv.size(-2)
    weight = torch.ones(nodes, nodes) if weight is None else weight
    weight = weight.expand(*qkv.shape[:-1], nodes).reshape(-1, nodes, nodes)
    tokens = zip(qkv.reshape(-1, nodes, qkv.size(-1)), weight, strict=True)
    out = [reference.row_attention(token, HEADS, w) for token, w in tokens]
    return torch.stack(out).view(*qkv.shape[:-1], CHANNELS)


def fast(qkv, weight=None):
    return row_attention(qkv, HEADS, weight)[0]


def some_edges(*shape):
    """Random weights, of which some are 0; the first row of the first token hears nobody."""
    weight = torch.rand(*shape) * (torch.rand(*shape) < 0.7)
    weight.view(-1, *shape[-2:])[0, 0] = 0.0
    return weight


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)  # bytes: a few tokens


def served_in_blocks(out):
    return "_RowAttention" in type(out.grad_fn.next_functions[0][0]).__name__


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("nodes", [1, 2, 4, 5, 8])  # below and above the change of method
@pytest.mark.parametrize("weighted", ["none", "each", "shared", "per source"])
def test_equals_the_formula(nodes, weighted, double):
    qkv = torch.randn(7, nodes, 3 * CHANNELS, requires_grad=True)
    shape = {"each": (7, nodes, nodes), "shared": (nodes, nodes), "per source": (7, 1, nodes)}.get(weighted)
    inputs = [qkv] if shape is None else [qkv, some_edges(*shape).requires_grad_()]
    assert served_in_blocks(fast(*inputs))
    assert_same(nn.Module(), inputs, lambda: fast(*inputs), lambda: obvious(*inputs), tol=1e-10)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (0, 3)])
def test_any_leading_dimensions(shape, double):
    qkv = torch.randn(*shape, 3 * CHANNELS, requires_grad=True)
    out, alpha = row_attention(qkv, HEADS)
    assert out.shape == (*shape, CHANNELS) and alpha is None
    if out.numel():
        torch.testing.assert_close(out, obvious(qkv))
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == qkv.shape


@pytest.mark.parametrize("in_blocks", [False, True])
def test_shares_sum_to_one_or_nothing(in_blocks, monkeypatch, double):
    monkeypatch.setattr(blocks, "BLOCK", 1000 if in_blocks else 1 << 20)
    qkv, weight = torch.randn(7, 3, 3 * CHANNELS, requires_grad=True), some_edges(7, 3, 3)
    out, alpha = row_attention(qkv, HEADS, weight, return_shares=True)
    assert alpha.shape == (7, HEADS, 3, 3)
    torch.testing.assert_close(out, fast(qkv, weight))
    torch.testing.assert_close(alpha.sum(-1), (weight > 0).any(-1).unsqueeze(1).expand(7, HEADS, 3).double())
    assert torch.equal(out[0, 0], torch.zeros(CHANNELS))
    (grad,) = torch.autograd.grad(fast(qkv, weight).square().sum(), qkv)
    assert grad.isfinite().all() and grad[0, 0, :CHANNELS].eq(0).all()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("nodes", [3, 5])
def test_gradients_are_right_also_of_second_order(nodes, double):
    qkv = torch.randn(3, nodes, 3 * CHANNELS, requires_grad=True)
    weight = (torch.rand(3, nodes, nodes) + 0.1).requires_grad_()
    assert served_in_blocks(fast(qkv, weight))
    assert torch.autograd.gradcheck(fast, (qkv, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(fast, (qkv, weight), fast_mode=True)


@pytest.mark.usefixtures("_small_blocks")
def test_keeps_its_input_and_the_shares():
    qkv = torch.randn(50, 3, 3 * CHANNELS, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast(qkv)
    assert sorted(t.numel() for t in kept if t.data_ptr() != qkv.data_ptr()) == [50 * HEADS * 9]


def test_few_rows_take_the_plain_path():
    assert not served_in_blocks(fast(torch.randn(2, 3, 3 * CHANNELS, requires_grad=True)))


@pytest.mark.usefixtures("_small_blocks")
def test_half_precision_autocast_and_dropout():
    qkv, weight = torch.randn(5, 3, 3 * CHANNELS), some_edges(5, 3, 3)
    expected = fast(qkv, weight)
    half = fast(qkv.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(qkv, weight).float(), expected, rtol=0.05, atol=0.05)
    dropped = torch.stack([row_attention(qkv, HEADS, weight, dropout=0.3)[0] for _ in range(2000)])
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), expected, rtol=0.1, atol=0.1)
