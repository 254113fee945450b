import pytest
import torch
from contract import assert_same
from torch import nn

from graphmoe.ops import blocks
from graphmoe.ops.mix_linear import mix_linear


def obvious(x, operator, weight):
    return torch.einsum("...ij,...jf,df->...id", operator, x, weight)


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 200)  # bytes: a token or two


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("shape", [(3,), (1, 3), (7, 3), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_formula(shape, shared, double):
    module = nn.Linear(4, 6, bias=False)
    x = torch.randn(*shape, 4, requires_grad=True)
    operator = (torch.randn(3, 3) if shared else torch.randn(*shape, 3)).requires_grad_()

    def fast():
        return mix_linear(x, operator, module.weight)

    assert_same(module, [x, operator], fast, lambda: obvious(x, operator, module.weight))
    assert fast().shape == (*shape, 6)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_gradient_of_one_input_alone(trained, double):
    inputs = [torch.randn(7, 3, 4), torch.randn(7, 3, 3), torch.randn(4, 4)]
    inputs[trained].requires_grad_()
    (found,) = torch.autograd.grad(mix_linear(*inputs).square().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(obvious(*inputs).square().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_strided_input_and_gradient(double):
    module = nn.Linear(4, 4, bias=False)
    wide = torch.randn(5, 4, 3, requires_grad=True)
    operator = torch.randn(3, 3)
    assert_same(
        module,
        [wide],
        lambda: mix_linear(wide.transpose(1, 2), operator, module.weight).transpose(1, 2),
        lambda: obvious(wide.transpose(1, 2), operator, module.weight).transpose(1, 2),
    )


def test_half_precision_and_autocast_take_the_plain_path():
    x, operator, weight = torch.randn(5, 3, 4), torch.rand(3, 3), torch.randn(4, 4)
    expected = mix_linear(x, operator, weight)
    half = mix_linear(x.bfloat16(), operator.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert mix_linear(x, operator, weight).dtype == torch.bfloat16


def test_keeps_only_its_inputs():
    kept = []
    x = torch.randn(50, 3, 4, requires_grad=True)
    operator, weight = torch.rand(50, 3, 3), torch.randn(4, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix_linear(x, operator, weight)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (x, operator, weight)}
