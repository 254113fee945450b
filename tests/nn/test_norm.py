import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip
from torch import nn

from graphmoe.nn import RMSNorm


def test_is_torchs_norm(double):
    norm, torchs = RMSNorm(256, eps=1e-3), nn.RMSNorm(256, eps=1e-3)
    assert isinstance(norm, nn.RMSNorm) and repr(norm) == repr(torchs)
    nn.init.normal_(norm.weight)
    torchs.weight = norm.weight
    for tokens in (3, 300):  # below and above the size from which the kernel is used
        x = torch.randn(2, tokens, 256, requires_grad=True)
        assert_same(norm, [x], lambda x=x: norm(x), lambda x=x: torchs(x), tol=1e-11)


def test_contract(double):
    norm = RMSNorm(8)
    x = torch.randn(5, 8)
    assert_every_parameter_learns(norm, norm(x).square().sum())
    nn.init.normal_(norm.weight)
    assert_state_round_trip(norm, RMSNorm(8), lambda module: module(x))
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
