import pytest
import torch
from contract import assert_same
from torch import nn

from graphmoe.ops.dnc_sequence import dnc_sequence
from graphmoe.ops.dnc_step import dnc_step, interface_parts


def random_inputs(steps, batch=2, slots=4, width=3, heads=2, hidden=5):
    size = sum(interface_parts(heads, width))
    state = [
        torch.randn(batch, slots, width),
        torch.rand(batch, slots),
        torch.rand(batch, slots, slots) / slots * (1 - torch.eye(slots)),
        torch.rand(batch, slots) / slots,
        torch.softmax(torch.randn(batch, heads, slots), dim=-1),
        0.7 * torch.softmax(torch.randn(batch, slots), dim=-1),
        torch.randn(batch, heads * width),
        torch.randn(batch, hidden),
        torch.randn(batch, hidden),
    ]
    weights = [torch.randn(4 * hidden, heads * width + hidden), torch.randn(size, hidden), torch.randn(size)]
    return [torch.randn(steps, batch, 4 * hidden), *state, *weights]


def call(inputs):
    outputs, state, _ = dnc_sequence(inputs[0], tuple(inputs[1:10]), *inputs[10:])
    return torch.cat([part.flatten() for part in (outputs, *state)])


def step_by_step(inputs):
    projected, *slots, reads, hidden, cell, recurrent, interface, bias = inputs
    outputs = []
    for given in projected:
        gates = given + torch.cat((reads, hidden), dim=1) @ recurrent.T
        enter, forget, leave, new = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        *slots, reads, _ = dnc_step(*slots, hidden @ interface.T + bias)
        reads = reads.flatten(1)
        outputs.append(torch.cat((reads, hidden), dim=1))
    return torch.cat([part.flatten() for part in (*outputs, *slots, reads, hidden, cell)])


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "slots": 1, "width": 1, "heads": 1, "hidden": 1}])
def test_equals_its_steps(steps, sizes, double):
    inputs = [part.requires_grad_() for part in random_inputs(steps, **sizes)]
    assert_same(nn.Module(), inputs, lambda: call(inputs), lambda: step_by_step(inputs), tol=1e-11)


def test_gradient_is_that_of_the_differences(double):
    inputs = [part.requires_grad_() for part in random_inputs(2, slots=3, width=2, heads=1, hidden=2)]
    assert torch.autograd.gradcheck(lambda *x: call(x), inputs, eps=1e-7, atol=1e-4)


def test_gradient_of_one_input_alone(double):
    for index in range(13):
        inputs = random_inputs(3)
        inputs[index].requires_grad_()
        (found,) = torch.autograd.grad(call(inputs).square().sum(), inputs[index])
        (expected,) = torch.autograd.grad(step_by_step(inputs).square().sum(), inputs[index])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_gradients_and_twice_over(double):
    inputs = [part.requires_grad_() for part in random_inputs(4)]
    with torch.no_grad():
        plain = call(inputs)
    found = call(inputs)
    assert not plain.requires_grad and torch.equal(plain, found.detach())
    first = torch.autograd.grad(found.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(found.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_outlives_the_graph():
    import gc
    import weakref

    gc.disable()
    try:
        inputs = [part.requires_grad_() for part in random_inputs(2)]
        outputs, state, _ = dnc_sequence(inputs[0], tuple(inputs[1:10]), *inputs[10:])
        watched = weakref.ref(outputs.grad_fn)
        del outputs, state
        assert watched() is None
    finally:
        gc.enable()
