import pytest
import torch
from contract import assert_same
from torch import nn
from torch.nn import functional as F

from graphmoe.ops import blocks
from graphmoe.ops.gated_update import gated_update


def obvious(x, strength, gate, bias, neighbor, own):
    score = (x * gate[0]).sum(-1).unsqueeze(-1) + (x * gate[1]).sum(-1).unsqueeze(-2) + bias
    heard = torch.einsum("...ij,...jf->...if", strength * torch.sigmoid(score), x)
    return x + F.gelu(heard @ neighbor.T + x @ own.T)


def random_inputs(shape, shared=False):
    return [
        torch.randn(*shape, 4),
        torch.rand(3, 3) if shared else torch.rand(*shape, 3),
        torch.randn(2, 4),
        torch.randn(1),
        torch.randn(4, 4),
        torch.randn(4, 4),
    ]


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 200)  # bytes: a token or two


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("shape", [(3,), (1, 3), (7, 3), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_formula(shape, shared, double):
    inputs = [t.requires_grad_() for t in random_inputs(shape, shared)]
    assert_same(nn.Module(), inputs, lambda: gated_update(*inputs), lambda: obvious(*inputs))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("trained", range(6))
def test_gradient_of_one_input_alone(trained, double):
    inputs = random_inputs((7, 3))
    inputs[trained].requires_grad_()
    (found,) = torch.autograd.grad(gated_update(*inputs).square().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(obvious(*inputs).square().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_small_blocks")
def test_without_gradients_nothing_is_kept(double):
    inputs = [t.requires_grad_() for t in random_inputs((7, 3))]
    with torch.no_grad():
        out = gated_update(*inputs)
    torch.testing.assert_close(out, obvious(*inputs), rtol=1e-12, atol=1e-12)
    assert not out.requires_grad


def test_keeps_one_tensor_of_the_size_of_x():
    inputs = [t.requires_grad_() for t in random_inputs((50, 3))]
    own = {t.data_ptr() for t in inputs}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_update(*inputs)
    extra = sorted(t.numel() for t in kept if t.data_ptr() not in own)
    assert extra == [50 * 3 * 2, 50 * 3 * 4]  # the scores, and what the GELU is applied to


def test_half_precision_and_autocast_take_the_plain_path():
    inputs = random_inputs((5, 3))
    expected = gated_update(*inputs)
    half = gated_update(*(t.bfloat16() for t in inputs))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gated_update(*inputs), expected, rtol=0.05, atol=0.1)
