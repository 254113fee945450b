import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.ops import blocks, rms_norm

EPS = 1e-3


@pytest.fixture(params=[1, 64, 1 << 20], ids="block of {} bytes".format)
def small_blocks(request, monkeypatch):
    """Blocks of one row, of a few, and of all; the kernel is used whatever the size."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(rms_norm, "fills_blocks", lambda x: True)


def results(function, x: Tensor, weight: Tensor) -> list[Tensor]:
    out = function(x, weight)
    scalar = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return [out, *torch.autograd.grad(scalar, (x, weight))]


def case(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm.rms_norm(x, weight, EPS)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("shape", [(9, 4), (2, 3, 5), (1, 1), (4,), (0, 3), (2, 0, 3)], ids=str)
def test_equals_the_formula(small_blocks, shape):
    x, weight = case(*shape)
    for a, b in zip(results(ours, x, weight), results(formula, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck(small_blocks):
    assert torch.autograd.gradcheck(ours, case(3, 4))


def test_a_row_of_zeros(small_blocks):
    x, weight = case(3, 4)
    with torch.no_grad():
        x[1] = 0
    out, grad_x, grad_weight = results(ours, x, weight)
    assert not out[1].any()
    assert all(t.isfinite().all() for t in (grad_x, grad_weight))


def test_strided_rows_and_gradients(small_blocks):
    x, weight = case(6, 4)
    turned = x.t().contiguous().t()
    for a, b in zip(results(ours, turned, weight), results(formula, turned, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(ours(x, weight), x, torch.ones((), dtype=x.dtype).expand(6, 4))
    (expected,) = torch.autograd.grad(formula(x, weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_the_gain_or_only_the_rows_learn(small_blocks):
    x, weight = case(6, 4)
    _, grad_x, grad_weight = results(ours, x, weight)
    for live, want in ((x, grad_x), (weight, grad_weight)):
        operands = [t if t is live else t.detach() for t in (x, weight)]
        out = ours(*operands)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        assert torch.equal(torch.autograd.grad(out, live, grad)[0], want)


def test_uninitialised_memory_never_shows(monkeypatch, small_blocks):
    clean = results(ours, *(operands := case(9, 4)))
    monkeypatch.setattr(rms_norm, "empty", lambda like, *shape: like.new_full(shape, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(results(ours, *operands), clean, strict=True))


@pytest.mark.parametrize("rows", [4, 2048])
def test_large_and_small_equal_torch(rows):
    x = torch.randn(rows, 256, requires_grad=True)
    weight = torch.rand(256, requires_grad=True)
    expected = results(lambda x, w: F.rms_norm(x, (256,), w, EPS), x, weight)
    for a, b in zip(results(ours, x, weight), expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_low_precision_and_compilers_get_torchs_own(small_blocks):
    x, weight = (t.detach().bfloat16().requires_grad_() for t in case(6, 4))
    expected = results(lambda x, w: F.rms_norm(x, (4,), w, EPS), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(results(ours, x, weight), expected, strict=True))
    torch.compiler.reset()
    x, weight = case(6, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, x, weight), results(formula, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
