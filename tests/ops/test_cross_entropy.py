import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphmoe.errors import ConfigError
from graphmoe.ops import cross_entropy
from graphmoe.ops.cross_entropy import _forward_op, linear_cross_entropy

IGNORED = -100


def oracle(x: Tensor, weight: Tensor, label: Tensor, ignore: int = IGNORED) -> tuple[Tensor, Tensor]:
    """One row and one word at a time."""
    logits = torch.stack([torch.stack([(row * word).sum() for word in weight]) for row in x])
    losses = [
        z[0] * 0 if y == ignore else -(z[y].exp() / z.exp().sum()).log()
        for z, y in zip(logits, label.tolist(), strict=True)
    ]
    return torch.stack(losses), logits


def case(rows: int = 9, words: int = 7, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(words, channels, dtype=torch.float64, requires_grad=True)
    label = torch.randint(words, (rows,))
    label[::4] = IGNORED
    return x, weight, label


@pytest.fixture(params=[1, 2, 4, 100], ids="rows of a block: {}".format)
def blocks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(cross_entropy, "BLOCK_VALUES", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("through", ["losses", "logits", "both"])
@pytest.mark.parametrize("rows, words", [(9, 7), (1, 1), (1, 5), (8, 2)])
def test_equals_an_obvious_loop(blocks, through, rows, words):
    x, weight, label = case(rows, words)
    per_row = torch.rand(rows, dtype=torch.float64)
    per_logit = torch.randn(rows, words, dtype=torch.float64)

    def results(function):
        losses, logits = function(x, weight, label)
        terms = {"losses": (losses * per_row).sum(), "logits": (logits * per_logit).sum()}
        scalar = sum(terms.values()) if through == "both" else terms[through]
        return losses, logits, *torch.autograd.grad(scalar, (x, weight))

    for a, b in zip(results(linear_cross_entropy), results(oracle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck(blocks):
    x, weight, label = case(5, 4, 3)
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, label), (x, weight))


def test_other_ignored_label():
    x, weight, label = case()
    label = label.masked_fill(label == IGNORED, 3)
    losses, _ = linear_cross_entropy(x, weight, label, ignore_index=3)
    assert torch.equal(losses == 0, label == 3)
    torch.testing.assert_close(losses, oracle(x, weight, label, 3)[0])


def test_ignored_rows_receive_nothing():
    x, weight, label = case()
    linear_cross_entropy(x, weight, label)[0].sum().backward()
    assert torch.equal(x.grad.any(dim=1), label != IGNORED)


def test_no_row_and_no_counting_row():
    x, weight, label = case(0)
    losses, logits = linear_cross_entropy(x, weight, label)
    assert losses.shape == (0,) and logits.shape == (0, 7)
    losses.sum().backward()
    assert weight.grad.shape == weight.shape and not weight.grad.any()
    x, weight, label = case()
    losses, _ = linear_cross_entropy(x, weight, torch.full_like(label, IGNORED))
    losses.sum().backward()
    assert not losses.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_operands_get_no_gradient(frozen):
    x, weight, label = case()
    linear_cross_entropy(x, weight, label)[0].sum().backward()
    operands = [x.detach(), weight.detach()]
    live = operands[1 - frozen].requires_grad_()
    linear_cross_entropy(*operands, label)[0].sum().backward()
    assert operands[frozen].grad is None
    assert torch.equal(live.grad, (x, weight)[1 - frozen].grad)


def test_large_logits_stay_finite():
    x, weight, label = case()
    losses, _ = linear_cross_entropy(1e4 * x, weight, label)
    torch.testing.assert_close(losses, F.cross_entropy(1e4 * x @ weight.t(), label, reduction="none"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (x, weight)))


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_low_precision_stays_close(dtype, tol):
    x, weight, label = case(40, 30, 16)
    rounded = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    found = []
    for operands in (rounded, exact):
        losses, logits = linear_cross_entropy(*operands, label)
        assert logits.dtype == operands[0].dtype
        assert losses.dtype == torch.promote_types(dtype, torch.float32) or operands is exact
        found.append([losses, logits, *torch.autograd.grad(losses.mean(), operands)])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).abs().max() <= tol * b.abs().max()


def test_autocast_casts_like_a_linear_layer():
    x, weight, label = (t.detach() for t in case(12, 8, 8))
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, logits = linear_cross_entropy(x, weight, label)
    expected, _ = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), label)
    assert torch.equal(losses, expected) and losses.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    losses.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_strided_operands():
    x, weight, label = case()
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, label)[0].sum(), (x, weight))
    turned = [t.t().contiguous().t() for t in (x, weight)]
    found = torch.autograd.grad(linear_cross_entropy(*turned, label)[0].sum(), (x, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_checkpointing_and_compiling_give_the_same_gradients():
    x, weight, label = case()

    def loss(x, weight):
        losses, logits = linear_cross_entropy(x, weight, label)
        return losses.sum() + logits.square().sum()

    torch.compiler.reset()
    ways = (
        loss,
        lambda *a: checkpoint(loss, *a, use_reentrant=False),
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
    )
    plain, *others = [torch.autograd.grad(way(x, weight), (x, weight)) for way in ways]
    for found in others:
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_uninitialised_memory_never_shows(monkeypatch, blocks):
    x, weight, label = case()

    def results():
        losses, logits = linear_cross_entropy(x, weight, label)
        return losses, logits, *torch.autograd.grad(losses.sum(), (x, weight))

    clean = results()
    monkeypatch.setattr(cross_entropy, "empty", lambda like, *shape: like.new_full(shape, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(results(), clean, strict=True))


def test_operator_registration():
    torch.library.opcheck(_forward_op, (*case(), IGNORED))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.bfloat16, 0.03)])
def test_cuda_equals_cpu(blocks, dtype, tol):
    x, weight, label = case(40, 30, 16)
    found = []
    for device in ("cpu", "cuda"):
        operands = [t.detach().to(dtype).double().to(device) for t in (x, weight)]
        operands = [t.to(dtype if device == "cuda" else torch.float64).requires_grad_() for t in operands]
        losses, logits = linear_cross_entropy(*operands, label.to(device))
        found.append([losses, logits, *torch.autograd.grad(losses.mean(), operands)])
    for a, b in zip(*found, strict=True):
        assert (a - b.double().cpu()).abs().max() <= tol * a.abs().max()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": torch.zeros(7, 4)}, ConfigError, r"weight: .* expected \('V', 5\); got \(7, 4\)"),
        ({"x": torch.zeros(3, 3, 5)}, ConfigError, "weight: weight does not fit x"),
        ({"label": torch.zeros(8, dtype=torch.long)}, ConfigError, r"label: one label a row; .* got \(8,\)"),
        ({"label": torch.full((9,), 7)}, RuntimeError, "out of bounds"),
        ({"label": torch.full((9,), -1)}, RuntimeError, "out of bounds"),
    ],
)
def test_wrong_input(change, error, match):
    x, weight, label = (t.detach() for t in case())
    operands = {"x": x.float(), "weight": weight.float(), "label": label, **change}
    with pytest.raises(error, match=match):
        linear_cross_entropy(*operands.values())
