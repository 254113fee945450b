import pytest
import torch
from torch import nn

from graphmoe.nn import CoupleConv
from graphmoe.train.optim import adamw, clear_moments, scale_updates


def stack():
    return nn.Parameter(torch.randn(4, 3, 2))


def test_decay_touches_matrices_only():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "lin": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "couple": CoupleConv(4, 3),
        }
    )
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.1)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {"lin.weight", "couple.gate", "couple.lin_neighbor.weight", "couple.lin_self.weight"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.5, fused=True),
    lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5),
])  # fmt: skip
def test_scaled_slices(make):
    torch.manual_seed(1)
    scaled, plain = stack(), None
    plain = nn.Parameter(scaled.detach().clone())
    optimizers = make(scaled), make(plain)
    scale_updates(optimizers[0], {scaled: lambda: torch.tensor([1.0, 0.0, 0.25, 1.0])})
    start = scaled.detach().clone()
    for p, o in zip((scaled, plain), optimizers, strict=True):
        p.grad = torch.ones_like(p)
        o.step()
    assert torch.equal(scaled[[0, 3]], plain[[0, 3]])
    assert torch.equal(scaled[1], start[1])  # weight decay included
    torch.testing.assert_close(scaled[2] - start[2], 0.25 * (plain[2] - start[2]))


def test_frozen_slices_stay_for_a_hundred_steps():
    parameter = stack()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    scale_updates(optimizer, {parameter: lambda: torch.tensor([1.0, 1.0, 1.0, 0.0])})
    start = parameter.detach().clone()
    for _ in range(100):
        parameter.grad = torch.randn_like(parameter)
        parameter.grad[3] = 0
        optimizer.step()
    assert torch.equal(parameter[3], start[3])
    assert not torch.equal(parameter[0], start[0])


def test_a_frozen_slice_survives_a_nan():
    parameter = stack()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scale_updates(optimizer, {parameter: lambda: torch.tensor([1.0, 1.0, 1.0, 0.0])})
    start = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert torch.equal(parameter[3], start[3])


def test_clear_moments():
    parameter = stack()
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    clear_moments(optimizer, parameter, torch.tensor([1]))  # nothing there yet
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    step = optimizer.state[parameter]["step"].clone()
    clear_moments(optimizer, parameter, torch.tensor([1, 2]))
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[parameter][name]
        assert (moment[[1, 2]] == 0).all() and (moment[[0, 3]] != 0).all()
    assert optimizer.state[parameter]["step"] == step
