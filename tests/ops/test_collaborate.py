from functools import partial
from types import SimpleNamespace

import pytest
import reference
import torch
from contract import assert_same
from torch import nn

from graphmoe.ops import blocks
from graphmoe.ops.collaborate import collaborate

HEADS, CHANNELS, HIDDEN = 2, 6, 5
NAMES = ("qkv", "out", "attention_gain", "feed_forward_gain", "gate_up", "down")
SIZES = ((18, 6), (6, 6), (6,), (6,), (10, 6), (6, 5))


def random_inputs(tokens, nodes, *, weighted=True):
    """Rows, weights of which some are 0, and the parameters."""
    weight = torch.rand(tokens, nodes, nodes) * (torch.rand(tokens, nodes, nodes) < 0.7)
    parameters = [torch.randn(*size) / size[-1] ** 0.5 for size in SIZES]
    return [torch.randn(tokens, nodes, CHANNELS), weight if weighted else None, *parameters]


def fast(*inputs, rounds=2):
    return collaborate(*inputs, heads=HEADS, rounds=rounds)


def obvious(x, weight, *parameters, rounds=2):
    named = {name: SimpleNamespace(weight=p) for name, p in zip(NAMES, parameters, strict=True)}
    conv = SimpleNamespace(
        attention=SimpleNamespace(heads=HEADS, lin_qkv=named["qkv"], lin_out=named["out"]),
        attention_norm=named["attention_gain"],
        feed_forward_norm=named["feed_forward_gain"],
        gate_up_proj=named["gate_up"],
        down_proj=named["down"],
    )
    nodes = x.size(1)
    weight = torch.ones(len(x), nodes, nodes) if weight is None else weight
    out = [reference.collaborate(conv, t, w, rounds) for t, w in zip(x, weight, strict=True)]
    return torch.stack(out)


def in_blocks(out):
    return "_Collaborate" in type(out.grad_fn.next_functions[0][0]).__name__


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 500)  # bytes: a few tokens


@pytest.mark.parametrize("nodes", [1, 3, 5])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_formula(nodes, rounds, weighted, double):
    inputs = random_inputs(5, nodes, weighted=weighted)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    assert in_blocks(fast(*inputs, rounds=rounds))
    first, second = partial(fast, *inputs, rounds=rounds), partial(obvious, *inputs, rounds=rounds)
    assert_same(nn.Module(), leaves, first, second, tol=1e-10)


@pytest.mark.parametrize("trained", range(8))
def test_gradient_of_one_input_alone(trained, double):
    inputs = random_inputs(7, 3)
    inputs[trained].requires_grad_()
    assert in_blocks(fast(*inputs))
    (found,) = torch.autograd.grad(fast(*inputs).square().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(obvious(*inputs).square().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nodes", [2, 5])
def test_gradients_are_right_also_of_second_order(nodes, double):
    inputs = random_inputs(2, nodes)
    inputs[1] = inputs[1] + 0.1  # at 0 an edge disappears
    for t in inputs:
        t.requires_grad_()
    assert in_blocks(fast(*inputs))
    assert torch.autograd.gradcheck(fast, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fast, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (0, 3)])
def test_any_leading_dimensions(shape, double):
    _, _, *parameters = random_inputs(1, 3)
    x = torch.randn(*shape, CHANNELS)
    out = fast(x, None, *parameters)
    assert out.shape == x.shape
    if x.numel():
        torch.testing.assert_close(
            out.view(-1, 3, CHANNELS), obvious(x.view(-1, 3, CHANNELS), None, *parameters)
        )


def test_without_gradients_nothing_is_kept(double):
    inputs = [t.requires_grad_() for t in random_inputs(9, 3)]
    with torch.no_grad():
        out = fast(*inputs, rounds=3)
    assert not out.requires_grad
    torch.testing.assert_close(out, obvious(*inputs, rounds=3))


def test_keeps_the_results_of_the_large_products():
    inputs = [t.requires_grad_() for t in random_inputs(50, 3)]
    own = {t.data_ptr() for t in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast(*inputs, rounds=2)
    rows = 50 * 3
    each_round = [3 * CHANNELS, HEADS * 3, CHANNELS, 1, 1, 2 * HIDDEN]
    expected = [rows * CHANNELS, *(2 * rows * size for size in each_round)]
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == sorted(expected)


def test_few_rows_half_precision_and_autocast_take_the_plain_path(monkeypatch):
    inputs = random_inputs(5, 3)
    expected = fast(*inputs)
    half = fast(*(t.bfloat16() for t in inputs))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*inputs).float(), expected, rtol=0.1, atol=0.1)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    plain = fast(inputs[0].requires_grad_(), *inputs[1:])
    assert not in_blocks(plain)
    torch.testing.assert_close(plain, expected)
