import pytest
import torch

from graphmoe.errors import GraphError
from graphmoe.ops.chain_scan import chain_scan, ranks


def one_by_one(decay, update, start, chain, time=None):
    """One event after another."""
    order = range(len(chain)) if time is None else sorted(range(len(chain)), key=lambda m: float(time[m]))
    state = list(start.unbind())
    before = [None] * len(chain)
    for m in order:
        c = int(chain[m])
        before[m] = state[c]
        state[c] = decay[m] * state[c] + update[m]
    return torch.stack(before) if before else update, torch.stack(state)


def events(count, chains, channels=3, dtype=torch.float64):
    decay = torch.rand(count, channels, dtype=dtype).requires_grad_()
    update = torch.randn(count, channels, dtype=dtype).requires_grad_()
    start = torch.randn(chains, channels, dtype=dtype).requires_grad_()
    return decay, update, start, torch.randint(chains, (count,))


@pytest.mark.parametrize("count, chains", [(1, 1), (40, 7), (9, 30), (25, 1)])
@pytest.mark.parametrize("timed", [False, True])
def test_equals_one_event_after_another(count, chains, timed):
    *tensors, chain = events(count, chains)
    time = torch.randint(6, (count,)) if timed else None  # with ties
    found, want = chain_scan(*tensors, chain, time), one_by_one(*tensors, chain, time)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in want]
    grads = [torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, out, strict=True)), tensors)
             for out in (found, want)]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_single_precision():
    *tensors, chain = events(300, 9, dtype=torch.float32)
    for a, b in zip(chain_scan(*tensors, chain), one_by_one(*tensors, chain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradcheck_with_empty_chains():
    *tensors, _ = events(6, 5)
    chain = torch.tensor([0, 3, 3, 0, 3, 0])
    assert torch.autograd.gradcheck(lambda *t: chain_scan(*t, chain), tensors)


def test_no_event_and_no_chain():
    decay, update, start, chain = events(0, 4)
    before, last = chain_scan(decay, update, start, chain)
    assert before.shape == (0, 3) and torch.equal(last, start)
    last.sum().backward()
    assert torch.equal(start.grad, torch.ones_like(start))
    before, last = chain_scan(*(t[:0] for t in (decay, update, start, chain)))
    assert before.shape == last.shape == (0, 3)


def test_inputs_stay_as_they_are():
    *tensors, chain = events(20, 3)
    copies = [t.detach().clone() for t in tensors]
    before, last = chain_scan(*tensors, chain)
    (before.sum() + last.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_ranks():
    assert ranks(torch.tensor([2, 0, 2, 2, 0]), 4).tolist() == [0, 0, 1, 2, 1]


def test_compiles_in_one_graph():
    *tensors, chain = events(20, 3)
    torch.library.opcheck(torch.ops.graphmoe.chain_scan.default, (*tensors, chain, None))


def test_wrong_sizes():
    decay, update, start, chain = events(5, 2)
    with pytest.raises(GraphError, match=r"update: not one row for each event; expected \[5, 3\]"):
        chain_scan(decay, update[:4], start, chain)
