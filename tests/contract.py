"""What every layer owes: gradients to every parameter, a state that survives, an untouched eval."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(
    module: nn.Module, inputs: list[Tensor], call: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Output of ``call`` and the gradients of a fixed scalar of it to inputs and parameters."""
    out = call()
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    leaves = [*inputs, *module.parameters()]
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return out.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


def assert_same(module: nn.Module, inputs: list[Tensor], first, second, *, tol: float = 1e-12) -> None:
    """Two ways to call a module give equal outputs and equal gradients."""
    out_a, grads_a = gradients(module, inputs, first)
    out_b, grads_b = gradients(module, inputs, second)
    torch.testing.assert_close(out_a, out_b, rtol=tol, atol=tol)
    for a, b in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def assert_every_parameter_learns(module: nn.Module, loss: Tensor) -> None:
    loss.backward()
    idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle, f"no gradient: {idle}"


def assert_state_round_trip(module: nn.Module, fresh: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    fresh.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(call(module), call(fresh))


def assert_eval_changes_nothing(module: nn.Module, call: Callable[[], object]) -> None:
    before = copy.deepcopy(module.state_dict())
    module.eval()
    call()
    module.train()
    call()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
