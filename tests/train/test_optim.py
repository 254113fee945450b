import math

import pytest
import torch
from torch import nn

from graphmoe.errors import ConfigError
from graphmoe.nn import CoupleConv
from graphmoe.train.optim import (
    LARGEST_SCALE,
    adamw,
    clear_moments,
    ghost_learning_rate,
    ghost_update_scale,
    require_ghost_rates,
    scale_updates,
)


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


def drive(optimizers, gradients):
    """Step each optimiser through the same gradients; its one parameter has a copy of each."""
    for gradient in gradients:
        for optimizer in optimizers:
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = gradient.to(parameter).clone()
            optimizer.step()


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 7.0, LARGEST_SCALE])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_adamw_is_adamw_at_the_scaled_rate(double, ratio, fused):
    start, gradients = torch.randn(4, 3, 2), torch.randn(20, 4, 3, 2)
    lr, options = 1e-3, {"weight_decay": 0.5, "betas": (0.9, 0.95), "fused": fused}
    scaled = torch.optim.AdamW([nn.Parameter(start.clone())], lr=lr, **options)
    plain = torch.optim.AdamW([nn.Parameter(start.clone())], lr=lr, **options)
    faster = torch.optim.AdamW([nn.Parameter(start.clone())], lr=lr * ratio, **options)
    (parameter,) = scaled.param_groups[0]["params"]
    scale_updates(scaled, {parameter: lambda: torch.tensor([1.0, 1.0, ratio, ratio])})
    drive((scaled, plain, faster), gradients)
    (a,), (b,), (c,) = (o.param_groups[0]["params"] for o in (scaled, plain, faster))
    assert torch.equal(a[:2], b[:2])
    torch.testing.assert_close(a[2:], c[2:], rtol=1e-12, atol=1e-12)
    if ratio != 1:
        assert (a[2:] - b[2:]).abs().min() > 1e-5
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(scaled.state[a][name], plain.state[b][name]), name


def test_scale_one_leaves_the_bits_of_every_step():
    start, gradients = torch.randn(4, 3, 2), torch.randn(20, 4, 3, 2)
    scaled, plain = (adamw_of(start.clone(), 1e-2) for _ in range(2))
    (parameter,) = scaled.param_groups[0]["params"]
    scale_updates(scaled, {parameter: lambda: torch.tensor([1.0, 1.0, 50.0, 1.0])})
    drive((scaled, plain), gradients)
    (other,) = plain.param_groups[0]["params"]
    assert torch.equal(parameter[[0, 1, 3]], other[[0, 1, 3]])
    assert not torch.equal(parameter[2], other[2])


def adamw_of(tensor, lr):
    return torch.optim.AdamW([nn.Parameter(tensor)], lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def test_the_largest_scale_keeps_single_precision():
    """The update of a weight of about 1 is off by at most the percentage that the docstring gives."""
    start = torch.rand(1, 1000) + 0.5
    gradients = torch.randn(1, 1, 1000)
    scaled, exact = adamw_of(start.clone(), 1e-3 / LARGEST_SCALE), adamw_of(start.double(), 1e-3)
    (parameter,), (reference,) = (o.param_groups[0]["params"] for o in (scaled, exact))
    scale_updates(scaled, {parameter: lambda: torch.tensor([LARGEST_SCALE])})
    drive((scaled, exact), gradients)
    error = (parameter.double() - reference).abs() / (reference - start.double()).abs()
    assert 1e-5 < error.max() < 0.01


LEVELS = torch.tensor([0.0, 0.25, 1.0])


@pytest.mark.parametrize(
    "policy, lr, expected",
    [
        ("level", 0.25, 0.25),
        ("level", 0.0, 0.0),
        ("inverse", 0.25, 0.5 * 0.75),
        ("inverse", 1.0, 0.0),
        ("inverse", 0.0, 0.0),
        ("inverse", 1.0 + 1e-9, 0.0),  # a schedule may round up, an update never turns around
        ("complementary", 0.25, 0.5 * (0.75 * 0.5 + 0.1)),
        ("complementary", 1.0, 0.5 * 0.1),
        ("complementary", 0.0, 0.0),
        ("inverse", 1e-4, 1e-4 * LARGEST_SCALE),
        ("complementary", 1e-4, 1e-4 * LARGEST_SCALE),
        ("inverse", 5e-324, 0.0),
    ],
)
def test_rate_of_ghosts_by_hand(policy, lr, expected):
    rate = ghost_learning_rate(policy, lr, 1.0, 0.5, LEVELS)
    torch.testing.assert_close(rate, expected * LEVELS, rtol=1e-6, atol=1e-12)
    assert rate[0] == 0 and rate.isfinite().all()
    assert torch.equal(lr * ghost_update_scale(policy, lr, 1.0, 0.5, LEVELS), rate)


def test_an_active_ghost_of_the_level_policy_has_scale_one():
    for lr in (0.1, 0.3, 1e-7, 0.0):
        assert torch.equal(ghost_update_scale("level", lr, 0.0, 0.0, LEVELS), LEVELS)


@pytest.mark.parametrize("policy", ["inverse", "complementary"])
def test_rates_along_a_cosine_are_those_asked_for_down_to_a_hundredth_of_the_peak(policy):
    steps = 1000
    for step in range(steps + 1):
        lr = 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rest = 1 - lr / 0.02
        wished = 0.01 * (rest if policy == "inverse" else 0.5 * rest + 0.1)
        rate = ghost_learning_rate(policy, lr, 0.02, 0.01, torch.ones(1, dtype=torch.float64)).item()
        assert rate == pytest.approx(min(wished, 100 * lr), rel=1e-12, abs=1e-300)
        if lr > 0.02 / 100:
            assert rate == pytest.approx(wished, rel=1e-12)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("linear", 1.0, 1.0), "ghost_lr_schedule: unknown.*level, inverse, complementary; got 'linear'"),
        (("linear", None, -1.0), "ghost_lr_schedule"),
        (("inverse", 1.0, -1e-9), "ghost_learning_rate: rate of the ghosts.*got -1e-09"),
        (("level", 1.0, -1.0), "ghost_learning_rate"),
        (("level", 1.0, float("nan")), "ghost_learning_rate.*got nan"),
        (("complementary", 1.0, float("inf")), "ghost_learning_rate.*got inf"),
        (("inverse", None, 1.0), "learning_rate: the inverse rate.*relative to a peak"),
        (("complementary", 0.0, 1.0), "learning_rate: the complementary rate.*got 0.0"),
        (("inverse", float("nan"), None), "learning_rate: the inverse rate.*got nan"),
    ],
)
def test_rates_of_ghosts_that_cannot_be(arguments, match):
    with pytest.raises(ConfigError, match=match):
        require_ghost_rates(*arguments)


def test_rates_of_ghosts_that_can_be():
    require_ghost_rates("level", None, None)
    require_ghost_rates("inverse", 1e-3, 0.0)
    with pytest.raises(ConfigError, match="ghost_lr_schedule"):
        ghost_learning_rate("linear", 0.1, 1.0, 1.0, LEVELS)
