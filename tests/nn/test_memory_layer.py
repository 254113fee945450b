import copy

import pytest
import torch

from graphmoe.errors import ConfigError
from graphmoe.nn import MemoryLayer, edge_form
from graphmoe.nn.budget import within_budget
from graphmoe.typing import MemoryState
from tests.contract import assert_eval_changes_nothing, assert_every_parameter_learns, assert_same


def by_hand(layer, x, mask=None, key=None, write=None):
    """One sequence, one token, one slot and one head at a time, with what was left in the end."""
    out, left = torch.zeros_like(x), []
    d = layer.read.head_channels
    for b in range(len(x)):
        slots = list(layer.bank.slots.unbind())
        for t in range(x.size(1)):
            if mask is not None and not mask[b, t]:
                continue
            h = x[b, t]
            inner = layer.router.hidden
            seen = key[b, t] if layer.by_key else h
            score = layer.router.weight @ (seen if inner is None else inner(seen).relu())
            mine = sorted(range(len(slots)), key=lambda s: (-score[s].item(), s))[: layer.k]
            weight = score[mine].softmax(0)
            near = torch.stack([slots[s] for s in mine])
            heads = []
            for q, k, v in zip(
                layer.read.lin_query(h).split(d),
                layer.read.lin_key(near).split(d, dim=1),
                layer.read.lin_value(near).split(d, dim=1),
                strict=True,
            ):
                heads.append((k @ q / d**0.5 + weight.log()).softmax(0) @ v)
            heard = torch.cat(heads)
            seen = torch.cat([heard, h]) if layer.read_dependent_gate else h
            gate = layer.lin_gate(seen).sigmoid()
            if write is not None:
                gate = gate * write[b, t]
            erase, update = layer.write.lin_erase(h).sigmoid(), layer.write.lin_update(h)
            if layer.lin_write_key is not None:
                update = update * layer.lin_write_key(key[b, t])
                heard = heard * layer.lin_read_key(key[b, t])
            for w, s in zip(weight, mine, strict=True):
                slots[s] = (1 - w * gate * erase) * slots[s] + w * gate * update
            out[b, t] = layer.lin_out(heard)
        left.append(torch.stack(slots))
    return torch.cat([out.flatten(), torch.stack(left).flatten()])


def library(layer, x, **options):
    out, state, _ = layer(x, **options)
    return torch.cat([out.flatten(), state.slots.flatten()])


OPTIONS = {
    "plain": {},
    "binding": {"binding": True},
    "read_dependent_gate": {"read_dependent_gate": True},
    "both": {"binding": True, "read_dependent_gate": True},
    "dense": {"k": 6},
    "by key": {"address": "key"},
    "no hidden": {"router_hidden": 0, "k": 1},
}


def build(**options):
    return MemoryLayer(8, 6, **options)


def inputs(layer, batch=3, length=7):
    x = torch.randn(batch, length, 8, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 4:] = mask[1, 0] = False
    write = torch.rand(batch, length) < 0.7
    wanted = layer.lin_read_key is not None or layer.by_key
    key = torch.randn(batch, length, 8) if wanted else None
    return x, {"mask": mask, "write": write, "key": key}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_one_step_after_another(name, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    assert_same(
        layer, [x], lambda: library(layer, x, **options), lambda: by_hand(layer, x, **options), tol=1e-11
    )


@pytest.mark.parametrize("name", ["plain", "both"])
def test_fast_form_is_the_edge_form(name, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)

    def slow():
        with edge_form(layer):
            return library(layer, x, **options)

    assert_same(layer, [x], lambda: library(layer, x, **options), slow)


def test_single_precision_and_autocast():
    layer = build(binding=True)
    x, options = inputs(layer)
    torch.testing.assert_close(
        library(layer, x, **options), by_hand(layer, x, **options), rtol=1e-5, atol=1e-5
    )
    _, state, plain = layer(x, **options)
    with torch.autocast("cpu", torch.bfloat16):
        _, half_state, half = layer(x, **options)
    assert half.routing.logits.dtype == half_state.slots.dtype == torch.float32
    assert torch.equal(half.routing.expert, plain.routing.expert)
    torch.testing.assert_close(half_state.slots, state.slots, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cuts", [[3], [1, 2, 6], [0, 7]])
def test_chunks_are_one_long_sequence(name, cuts, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    whole, last, _ = layer(x, **options)
    parts, state = [], None
    for start, end in zip([0, *cuts], [*cuts, 7], strict=True):
        piece = {n: None if v is None else v[:, start:end] for n, v in options.items()}
        out, state, _ = layer(x[:, start:end], state=state, **piece)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.slots, last.slots, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.steps, last.steps)
    assert last.steps.tolist() == [4, 6, 7]


@pytest.mark.parametrize("name", ["plain", "both"])
def test_nobody_hears_the_future_or_another_sequence(name, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    before, _, _ = layer(x, **options)
    other = x.detach().clone()
    other[:, 5:] += 1
    other[2] += 1
    after, _, _ = layer(other, **options)
    assert torch.equal(before[:2, :5], after[:2, :5])
    assert not torch.equal(before[1, 6], after[1, 6])


def test_padding_and_readers_change_nothing():
    layer = build()
    x, options = inputs(layer)
    out, state, record = layer(x, **options)
    mask, write = options["mask"], options["write"]
    assert not out[~mask].any() and not record.read[~mask.flatten()].any()
    assert int(record.routing.ptr[-1]) == 2 * int(mask.sum())
    assert not record.gate[~write.flatten()].any()
    only_readers = torch.zeros_like(write)
    _, same, _ = layer(x, state=state, write=only_readers)
    assert torch.equal(same.slots, state.slots)


@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    out, state, record = layer(x, key=options["key"])
    k = layer.k
    assert out.shape == x.shape and state.slots.shape == (3, 6, 8) and state.steps.tolist() == [7] * 3
    assert record.read.shape == (21, 4, k) and record.gate.shape == (21,)
    torch.testing.assert_close(record.read.sum(dim=2), torch.ones(21, 4))
    assert_eval_changes_nothing(layer, lambda: layer(x, key=options["key"]))
    if k > 1:  # the weight of a single slot is 1, whatever the scores are
        assert_every_parameter_learns(layer, out.square().sum())
    fresh = build(**OPTIONS[name])
    for module in (layer, fresh):
        torch.manual_seed(5)
        module.reset_parameters()
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in layer.state_dict().items())
    assert f"num_slots=6, k={k}" in repr(layer)


@pytest.mark.parametrize("name", OPTIONS)
def test_sequences_may_stand_one_after_another(name, double):
    layer = build(**OPTIONS[name])
    x, options = inputs(layer)
    there = options["mask"]
    want, last, _ = layer(x, **options)
    batch = torch.arange(3).repeat_interleave(there.sum(dim=1))
    key = None if options["key"] is None else options["key"][there]
    out, state, record = layer(x[there], key=key, write=options["write"][there], batch=batch)
    torch.testing.assert_close(out, want[there], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.slots, last.slots, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.steps, last.steps)
    assert record.read.shape == (17, 4, layer.k)
    _, state, _ = layer(x[there], key=key, batch=batch, batch_size=5)  # two sequences without a token
    assert torch.equal(state.slots[4], layer.bank.slots)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("name", ["plain", "read_dependent_gate"])
def test_small_sizes(batch, length, name):
    layer = build(**OPTIONS[name])
    out, state, record = layer(torch.randn(batch, length, 8))
    assert out.shape == (batch, length, 8) and state.slots.shape == (batch, 6, 8)
    assert record.read.shape == (batch * length, 4, 2) and record.gate.shape == (batch * length,)


def test_edges_may_be_taken_away(double):
    layer = build(read_dependent_gate=True)
    parallel = build()
    x, _ = inputs(layer)

    for module in (layer, parallel):
        out, state, record = module(x, thin=lambda routing: within_budget(routing, 0.999))
        assert int(record.routing.ptr[-1]) == 21
        assert ((record.read > 0).sum(dim=2) == 1).all()
        assert out.isfinite().all() and state.slots.isfinite().all()


def test_a_copy_is_another_memory():
    layer = build()
    x, _ = inputs(layer)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])


def test_wrong_input():
    with pytest.raises(ConfigError, match="k: k must not exceed the number of slots; expected 1 <= k <= 6"):
        build(k=7)
    with pytest.raises(ConfigError, match="heads: heads must divide"):
        build(heads=3)
    with pytest.raises(ConfigError, match="address: unknown address; expected one of token, key; got 'time'"):
        build(address="time")
    layer, x = build(), torch.randn(2, 3, 8)
    with pytest.raises(ConfigError, match="key: key does not fit the memory; expected none without binding"):
        layer(x, key=x)
    with pytest.raises(ConfigError, match=r"key: key does not fit the memory; expected a key as large as x"):
        build(binding=True)(x)
    with pytest.raises(ConfigError, match=r"mask: of another size; expected \[2, 3\]"):
        layer(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"state: of another size; expected \[2, 6, 8\]"):
        layer(x, state=MemoryState(torch.zeros(1, 6, 8), torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ConfigError, match=r"x: not sequences of tokens; expected \[B, T, 8\]"):
        layer(x[0])
    with pytest.raises(ConfigError, match=r"batch: of another size; expected \[3\]"):
        layer(x[0], batch=torch.zeros(2, dtype=torch.long))
