import pytest
import torch
from contract import assert_every_parameter_learns, assert_state_round_trip

from graphmoe.models.image_encoder import ConvEncoder, PatchEncoder
from graphmoe.nn import edge_form

BUILD = {
    "conv": lambda: ConvEncoder(1, 16, 8, 8),
    "conv with a map": lambda: ConvEncoder(1, 32, 8, 8),
    "patch": lambda: PatchEncoder(1, 16, 4, 16, 8, num_layers=2, heads=2),
}


def images(name: str, count: int = 6) -> torch.Tensor:
    side = 32 if name == "conv with a map" else 16
    return torch.rand(count, 1, side, side)


@pytest.mark.parametrize("name", BUILD)
def test_contract(name):
    encoder, x = BUILD[name](), images(name)
    out = encoder(x)
    assert out.shape == (6, 8)
    assert_every_parameter_learns(encoder, (out * torch.randn_like(out)).sum())
    encoder.eval()
    assert_state_round_trip(encoder, BUILD[name]().eval(), lambda e: e(x))


@pytest.mark.parametrize("name", BUILD)
def test_batch_mates_do_not_matter_in_eval(name, double):
    encoder, x = BUILD[name](), images(name, 9)
    encoder(x)  # gives batch norm something to remember
    encoder.eval()
    whole = encoder(x)
    for count in (1, 2, 8):
        torch.testing.assert_close(encoder(x[:count]), whole[:count], rtol=1e-12, atol=1e-12)
    assert torch.equal(encoder(x), whole)


def test_batch_mates_do_matter_in_training_of_the_convolutions_only():
    for name, build in BUILD.items():
        encoder, x = build().train(), images(name)
        same = torch.allclose(encoder(x)[:2], encoder(x[:2]), atol=1e-5)
        assert same == (name == "patch"), name


def test_patches_attend_along_edges(double):
    encoder = BUILD["patch"]().eval()
    x = images("patch")
    with edge_form(encoder):
        edge = encoder(x)
    torch.testing.assert_close(encoder(x), edge, rtol=1e-10, atol=1e-10)
