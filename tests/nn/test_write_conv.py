import pytest
import torch

from graphmoe.errors import GraphError
from graphmoe.nn import WriteConv, edge_form
from tests.contract import assert_every_parameter_learns, assert_same


def graph():
    """Five tokens and four slots; nobody writes the third."""
    edges = torch.tensor([[0, 1, 3, 2, 0, 4, 1], [0, 0, 0, 1, 1, 3, 3]])
    weight = torch.tensor([0.5, 0.9, 0.3, 1.0, 0.2, 0.1, 0.7])
    gate = torch.tensor([0.9, 0.8, 1.0, 0.3, 0.6])
    return torch.randn(5, 3), torch.randn(4, 6), edges, weight, gate


def by_hand(conv, token, slot, edges, weight, gate, time=None):
    """One edge after another, or all edges of a slot at once."""
    erase, update = conv.lin_erase(token).sigmoid(), conv.lin_update(token)
    slot, before = list(slot.unbind()), [None] * edges.size(1)
    turns = [list(range(edges.size(1)))] if time is None else [[m] for m in time.argsort().tolist()]
    for turn in turns:
        after = list(slot)
        for s in {int(edges[1, m]) for m in turn}:
            mine = [m for m in turn if edges[1, m] == s]
            share = {m: weight[m] * gate[edges[0, m]] for m in mine}
            room = max(1.0, float(sum(share.values())))
            lost = sum(share[m] * erase[edges[0, m]] for m in mine) / room
            won = sum(share[m] * update[edges[0, m]] for m in mine) / room
            for m in mine:
                before[m] = slot[s]
            after[s] = (1 - lost) * slot[s] + won
        slot = after
    return torch.stack(slot), torch.stack(before)


@pytest.mark.parametrize("time", [None, torch.tensor([3, 1, 2, 0, 6, 5, 4])], ids=["at_once", "in_turn"])
def test_equals_the_formula(time, double):
    conv = WriteConv(3, 6)
    token, slot, edges, weight, gate = graph()
    token.requires_grad_()
    slot.requires_grad_()

    def library():
        if time is None:
            return conv((token, slot), edges, weight, gate)
        return torch.cat(conv((token, slot), edges, weight, gate, time, return_before=True))

    def oracle():
        last, before = by_hand(conv, token, slot, edges, weight, gate, time)
        return last if time is None else torch.cat([last, before])

    assert_same(conv, [token, slot], library, oracle)
    with edge_form(conv):
        assert_same(conv, [token, slot], library, oracle)


def test_contract():
    conv = WriteConv(3, 6)
    token, slot, edges, weight, gate = graph()
    out = conv((token, slot), edges, weight, gate)
    assert torch.equal(out[2], slot[2])
    perm = torch.randperm(7)
    torch.testing.assert_close(conv((token, slot), edges[:, perm], weight[perm], gate), out)
    assert_every_parameter_learns(conv, out.square().sum())
    assert torch.equal(conv((token, slot), edges[:, :0]), slot)
    last, before = conv((token, slot), edges[:, :0], time=edges[0, :0], return_before=True)
    assert torch.equal(last, slot) and before.shape == (0, 6)
    assert repr(conv) == "WriteConv(3, 6)"


def test_a_closed_gate_and_a_weight_of_0_change_nothing():
    conv = WriteConv(3, 6)
    token, slot, edges, weight, gate = graph()
    for time in (None, torch.arange(7)):
        assert torch.equal(conv((token, slot), edges, weight, 0 * gate, time), slot)
        assert torch.equal(conv((token, slot), edges, 0 * weight, gate, time), slot)


def test_a_slot_never_holds_more_than_its_old_contents_and_one_update():
    conv = WriteConv(3, 6)
    with torch.no_grad():
        conv.lin_erase.bias.fill_(100.0)  # erase everything
    token = torch.randn(40, 3)
    edges = torch.stack([torch.arange(40), torch.zeros(40, dtype=torch.long)])
    slot = torch.full((1, 6), 1e6)
    out = conv((token, slot), edges)  # forty full writes
    torch.testing.assert_close(out[0], conv.lin_update(token).mean(dim=0))


def test_key_multiplies_what_is_written():
    conv = WriteConv(3, 6)
    token, slot, edges, weight, gate = graph()
    with torch.no_grad():
        conv.lin_erase.bias.fill_(-100.0)  # erase nothing
    plain, bound = (conv((token, slot), edges, weight, gate, key=k) for k in (None, torch.full((5, 6), 2.0)))
    torch.testing.assert_close(bound - slot, 2 * (plain - slot))


def test_wrong_input():
    conv = WriteConv(3, 6)
    token, slot, edges, _, _ = graph()
    with pytest.raises(GraphError, match="x: tokens write slots"):
        conv(token, edges)
    with pytest.raises(GraphError, match="target id out of range"):
        conv((token, slot[:3]), edges)
    with pytest.raises(GraphError, match="time: edges that act at once have no before"):
        conv((token, slot), edges, return_before=True)
