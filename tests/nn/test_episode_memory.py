import copy

import pytest
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import ConfigError
from graphmoe.nn import edge_form
from graphmoe.nn.episode_memory import EpisodeMemory


def build(num_slots: int = 9) -> EpisodeMemory:
    memory = EpisodeMemory(6, num_slots, 4)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return memory


def episode(batch: int = 3):
    labels = torch.randint(0, 4, (batch, 7))
    return torch.randn(batch, 7, 6, requires_grad=True), labels, torch.randn(batch, 5, 6, requires_grad=True)


def test_fast_form_equals_edge_form(double):
    memory = build()
    x, labels, query = episode()

    def fast():
        state = memory.write(x, labels)
        return torch.cat([memory.read(state, query), memory.read(state, x, own(x))], dim=1)

    def edge():
        with edge_form(memory):
            return fast()

    assert_same(memory, [x, query], fast, edge, tol=1e-10)


def own(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.size(1)).expand(x.shape[:2])


def test_what_is_written_and_read_is_the_formula(double):
    memory = build()
    x, labels, query = episode(1)
    state = memory.write(x, labels)
    keys, gates = [], []
    for n in range(7):
        gate = torch.sigmoid(memory.gate.weight[0] @ x[0, n] + memory.gate.bias[0])
        write = memory.write_conv
        erase = torch.sigmoid(write.lin_erase.weight @ x[0, n] + write.lin_erase.bias)
        keys.append((1 - gate * erase) * memory.bank.slots[0] + gate * (write.lin_update.weight @ x[0, n]))
        gates.append(gate)
    torch.testing.assert_close(state.slots[0, :7], torch.stack(keys))
    assert torch.equal(state.slots[0, 7:], memory.bank.slots.expand(2, -1))
    recall = memory.recall_conv
    for m in range(5):
        asked = recall.lin_query.weight @ query[0, m]
        score = [
            g.log() - recall.log_temperature.exp() * (asked - k).pow(2).sum() / 6**0.5
            for g, k in zip(gates, keys, strict=True)
        ]
        share = torch.stack(score).softmax(0)
        wanted = torch.stack([share[labels[0] == c].sum() for c in range(4)])
        torch.testing.assert_close(memory.read(state, query)[0, m], wanted)


def test_memory_begins_anew_with_every_episode_and_keeps_episodes_apart(double):
    memory = build()
    x, labels, query = episode()
    before = copy.deepcopy(memory.state_dict())
    first = memory.read(memory.write(x, labels), query)
    memory.read(memory.write(torch.randn(3, 7, 6), labels), query)
    assert torch.equal(first, memory.read(memory.write(x, labels), query))
    for name, value in memory.state_dict().items():
        assert torch.equal(value, before[name])
    alone = memory.read(memory.write(x[1:2], labels[1:2]), query[1:2])
    torch.testing.assert_close(alone, first[1:2], rtol=1e-12, atol=1e-12)


def test_written_in_parts_is_written_at_once(double):
    memory = build()
    x, labels, _ = episode()
    once = memory.write(x, labels)
    parts = None
    for start, end in ((0, 2), (2, 2), (2, 3), (3, 7)):
        parts = memory.write(x[:, start:end], labels[:, start:end], parts)
    for a, b in zip(once, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert once.steps.tolist() == [7, 7, 7]


def test_neither_order_nor_spare_slots_nor_names_of_labels_matter(double):
    memory = build()
    x, labels, query = episode()
    wanted = memory.read(memory.write(x, labels), query)
    order = torch.randperm(7)
    torch.testing.assert_close(memory.read(memory.write(x[:, order], labels[:, order]), query), wanted)
    name = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(memory.read(memory.write(x, name[labels]), query)[..., name], wanted)
    large = build(40)
    large.load_state_dict(memory.state_dict())
    torch.testing.assert_close(large.read(large.write(x, labels), query), wanted)


def test_nothing_is_read_where_nothing_was_written(double):
    memory, query = build(), torch.randn(2, 3, 6)
    out, attention = memory.read(memory.empty(2), query, return_attention_weights=True)
    assert out.shape == (2, 3, 4) and (out == 0).all() and (attention == 0).all()


def test_a_hidden_slot_is_not_looked_at(double):
    memory = build()
    x, labels, _ = episode()
    state = memory.write(x, labels)
    _, attention = memory.read(state, x, own(x), return_attention_weights=True)
    assert (attention.diagonal(dim1=1, dim2=2) == 0).all() and (attention[:, :, 7:] == 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 7))


def test_contract():
    memory = build()
    x, labels, query = episode()
    call = lambda m: m.read(m.write(x, labels), query)  # noqa: E731
    assert_state_round_trip(memory, build(), call)
    assert_every_parameter_learns(memory, call(memory).square().sum())
    assert repr(memory) == "EpisodeMemory(6, slots=9, labels=4)"


def test_wrong_input():
    with pytest.raises(ConfigError, match="num_slots: a memory needs room; expected at least 1; got 0"):
        build(0)
    memory = build(6)
    x, labels, _ = episode()
    with pytest.raises(ConfigError, match=r"num_slots: more examples than the memory has room for; .* 7"):
        memory.write(x, labels)
    with pytest.raises(ConfigError, match=r"labels: label out of range; expected in \[0, 4\)"):
        memory.write(x[:, :2], labels[:, :2] + 4)
