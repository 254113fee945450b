import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.nn.sparse import ByteDropout


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_drops_its_share_and_keeps_the_mean(p):
    drop, x = ByteDropout(p), torch.ones(999, 101, requires_grad=True)
    out = drop(x)
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=0.01)
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / (1 - drop.p))]
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    # Every one of the eight bytes of a number decides alike.
    dropped = (drop(torch.ones(8 * 20_000)).view(-1, 8) == 0).double().mean(0)
    assert (dropped - drop.p).abs().max() < 0.02


def test_is_a_function_of_the_seed_and_nothing_in_eval():
    drop, x = ByteDropout(0.3), torch.ones(50)
    torch.manual_seed(4)
    first = drop(x)
    torch.manual_seed(4)
    assert torch.equal(drop(x), first)
    assert drop.eval()(x) is x and ByteDropout(0.0)(x) is x
    assert repr(drop) == "ByteDropout(p=0.300781)"


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_no_chance(p):
    with pytest.raises(ConfigError, match="no chance"):
        ByteDropout(p)
