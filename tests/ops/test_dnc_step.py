import pytest
import torch
from contract import assert_same
from reference_dnc import literal_step
from torch import nn

from graphmoe.nn.memory.addressing import content_weights
from graphmoe.nn.memory.allocation import allocation_weights
from graphmoe.ops.dnc_content import allocation
from graphmoe.ops.dnc_step import dnc_step, interface_parts


def random_slots(batch, slots, width, heads, *, written=True):
    """Slots as they are in the middle of a sequence, and an interface vector."""
    size = sum(interface_parts(heads, width))
    link = torch.rand(batch, slots, slots) / slots
    link.diagonal(dim1=1, dim2=2).zero_()
    state = [
        torch.randn(batch, slots, width),
        torch.rand(batch, slots),
        link,
        torch.rand(batch, slots) / slots,
        torch.softmax(torch.randn(batch, heads, slots), dim=-1),
        0.7 * torch.softmax(torch.randn(batch, slots), dim=-1),
    ]
    if not written:
        state = [torch.zeros_like(part) for part in state]
        state[0] += 1e-6
    return [*state, torch.randn(batch, size)]


def joined(parts):
    return torch.cat([part.flatten() for part in parts[:7]])


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 1, 1, 1), (3, 5, 2, 1), (1, 3, 2, 4)])
@pytest.mark.parametrize("written", [True, False])
def test_equals_the_double_loop(shape, written, double):
    inputs = [part.requires_grad_() for part in random_slots(*shape, written=written)]
    # Without usage every order of the slots is one of ascending usage; the first counts as freer.
    assert_same(
        nn.Module(),
        inputs,
        lambda: joined(dnc_step(*inputs)),
        lambda: joined(literal_step(*inputs)),
        tol=1e-10 if written else 1e-8,
    )


@pytest.mark.parametrize("written", [True, False])
def test_gradient_is_that_of_the_differences(written, double):
    inputs = [part.requires_grad_() for part in random_slots(2, 3, 2, 2)]
    if not written:  # near the first step, with usages that differ, so that their order does not change
        inputs[0] = (1e-3 * torch.rand(2, 3, 2)).requires_grad_()
        inputs[1] = (0.01 * torch.rand(2, 3) + 0.1 * torch.arange(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: dnc_step(*x)[:7], inputs, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("trained", range(7))
def test_gradient_of_one_input_alone(trained, double):
    inputs = random_slots(2, 4, 3, 3)
    inputs[trained].requires_grad_()
    (found,) = torch.autograd.grad(joined(dnc_step(*inputs)).square().sum(), inputs[trained])
    (expected,) = torch.autograd.grad(joined(literal_step(*inputs)).square().sum(), inputs[trained])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_one_result_alone(double):
    inputs = [part.requires_grad_() for part in random_slots(2, 4, 3, 2)]
    for index in range(7):
        found = torch.autograd.grad(dnc_step(*inputs)[index].square().sum(), inputs, allow_unused=True)
        loss = literal_step(*inputs)[index].square().sum()
        expected = torch.autograd.grad(loss, inputs, allow_unused=True)
        for ours, theirs, part in zip(found, expected, inputs, strict=True):
            theirs = torch.zeros_like(part) if theirs is None else theirs
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_head_that_frees_a_slot_wholly_has_a_gradient(double):
    inputs = random_slots(1, 3, 2, 2)
    inputs[4] = torch.eye(3)[None, :2].clone()
    inputs[6][:, -8:-6] = 100.0  # free gates of sigmoid(100) = 1: a factor of the retention is 0
    inputs = [part.requires_grad_() for part in inputs]
    assert_same(nn.Module(), inputs, lambda: joined(dnc_step(*inputs)), lambda: joined(literal_step(*inputs)))


def test_without_gradients_nothing_is_kept():
    inputs = [part.requires_grad_() for part in random_slots(2, 4, 3, 2)]
    with torch.no_grad():
        plain = dnc_step(*inputs)
    assert not any(part.requires_grad for part in plain)
    torch.testing.assert_close(plain, tuple(part.detach() for part in dnc_step(*inputs)))


def test_inputs_are_left_alone():
    inputs = [part.requires_grad_() for part in random_slots(2, 4, 3, 2)]
    before = [part.detach().clone() for part in inputs]
    results = dnc_step(*inputs)
    kept = [part.detach().clone() for part in results]
    joined(results).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, results, strict=True))


def test_strength_100_finds_one_slot():
    memory = torch.eye(4).expand(2, 4, 4)
    keys = torch.eye(4)[[2, 0]].expand(2, 2, 4)
    weights = content_weights(memory, keys, torch.full((2, 2), 100.0))
    torch.testing.assert_close(weights, torch.eye(4)[[2, 0]].expand(2, 2, 4))


def test_the_freest_slot_is_allocated_and_the_first_of_equal_ones():
    usage = torch.tensor([[0.9, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for found in (allocation(usage).weights, allocation_weights(usage)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_gradient_of_an_empty_memory_is_small():
    inputs = [part.requires_grad_() for part in random_slots(2, 16, 8, 1, written=False)]
    joined(dnc_step(*inputs)).sum().backward()
    assert all(part.grad.isfinite().all() for part in inputs)
    assert inputs[6].grad.abs().max() < 100
