"""Patches that a vision transformer leaves out while it trains."""

import pytest
import torch
from torch.testing import assert_close

from graphmoe.errors import ConfigError
from graphmoe.models.vit import PatchDropout


@pytest.mark.parametrize(("p", "kept"), [(0.5, 8), (0.75, 4), (0.99, 1), (0.0, 16)])
def test_the_class_token_and_different_patches_stay(p, kept):
    # Number of its image and of its place as the features of each token.
    x = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(17.0), indexing="ij"), dim=-1)
    out = PatchDropout(p).train()(x)
    assert out.shape == (5, 1 + kept, 2)
    assert (out[:, 0, 1] == 0).all() and (out[..., 0] == torch.arange(5.0)[:, None]).all()
    for places in out[:, 1:, 1].tolist():
        assert len(set(places)) == kept and min(places) >= 1
    assert PatchDropout(p).eval()(x) is x


def test_every_patch_stays_as_often_as_another():
    torch.manual_seed(0)
    x = torch.arange(9.0).expand(4000, 9).unsqueeze(-1)
    places = PatchDropout(0.5)(x)[:, 1:].long().flatten()
    assert_close(places.bincount()[1:] / 4000, torch.full((8,), 0.5), atol=0.04, rtol=0)


def test_gradients_reach_what_stays_only():
    x = torch.randn(3, 9, 2, requires_grad=True)
    PatchDropout(0.5)(x).sum().backward()
    assert (x.grad[:, 0] == 1).all() and (x.grad[:, 1:].sum(dim=1) == 4).all()


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_what_is_refused(p):
    with pytest.raises(ConfigError, match="no share of the patches"):
        PatchDropout(p)
