import pytest
import torch
from contract import (
    assert_eval_changes_nothing,
    assert_every_parameter_learns,
    assert_same,
    assert_state_round_trip,
)

from graphmoe.errors import ConfigError
from graphmoe.nn import DNCCell, DNCMemory, edge_form
from graphmoe.nn.memory import SlotState
from graphmoe.nn.memory.dnc_memory import memory_step, parse_interface
from graphmoe.nn.memory.linkage import LinkConv, link


def cell_of(heads=2):
    return DNCCell(3, 6, heads=heads, slot_channels=4)


def in_edges(cell, *args, **kwargs):
    with edge_form(cell):
        return cell(*args, **kwargs)


def flat(found):
    return torch.cat([part.flatten() for part in (found[0], *found[1])])


def test_sizes_and_repr():
    cell = cell_of()
    outputs, state = cell(torch.randn(5, 7, 3), num_slots=9)
    assert outputs.shape == (5, 7, 2 * 4 + 6) and cell.out_channels == 14
    shapes = [(5, 9, 4), (5, 9), (5, 9, 9), (5, 9), (5, 2, 9), (5, 9), (5, 8), (5, 6), (5, 6)]
    assert [tuple(part.shape) for part in state] == shapes
    assert cell.memory.interface_size == 4 * 2 + 3 * 4 + 5 * 2 + 3
    assert "heads=2, width=4" in repr(cell)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("slots", [1, 5])
def test_all_forms_agree(heads, slots, double):
    cell, x = cell_of(heads), torch.randn(2, 4, 3, requires_grad=True)

    def steps():
        return cell(x, num_slots=slots, return_states=True)[:2]

    def edges():
        return in_edges(cell, x, num_slots=slots)

    assert_same(cell, [x], lambda: flat(cell(x, num_slots=slots)), lambda: flat(steps()), tol=1e-11)
    assert_same(cell, [x], lambda: flat(cell(x, num_slots=slots)), lambda: flat(edges()), tol=1e-11)


def test_equations_equal_the_fast_form(double):
    memory, state = DNCMemory(2, 3), None
    state = memory.initial_state(2, 5, torch.zeros(()))
    for _ in range(6):
        told = torch.randn(2, memory.interface_size)
        expected, reads = memory_step(state, parse_interface(told, 2, 3))
        state, found, _ = memory(state, told)
        torch.testing.assert_close((*state, found), (*expected, reads), rtol=1e-11, atol=1e-11)


def test_contract():
    cell, x = cell_of(), torch.randn(4, 6, 3)

    def call(module):
        return flat(module(x, num_slots=5))

    assert_state_round_trip(cell, cell_of(), call)
    assert_eval_changes_nothing(cell, lambda: call(cell))
    assert_every_parameter_learns(cell, call(cell).square().sum())


def test_a_sequence_in_parts_is_the_whole(double):
    cell, x = cell_of(), torch.randn(2, 7, 3)
    whole = cell(x, num_slots=5)
    first, state = cell(x[:, :3], num_slots=5)
    second, state = cell(x[:, 3:], state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(whole[1]), rtol=1e-12, atol=1e-12)


def test_samples_do_not_meet_and_the_past_does_not_know_the_future(double):
    cell, x = cell_of(), torch.randn(3, 6, 3)
    whole = cell(x, num_slots=4)[0]
    torch.testing.assert_close(cell(x[1:2], num_slots=4)[0], whole[1:2], rtol=1e-12, atol=1e-12)
    other = x.clone()
    other[:, 4:] += 1
    assert torch.equal(cell(other, num_slots=4)[0][:, :4], whole[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_hold_over_a_thousand_steps(dtype):
    memory = DNCMemory(2, 4)
    state = memory.initial_state(3, 6, torch.zeros((), dtype=dtype))
    with torch.no_grad():
        for _ in range(1000):
            told = 3 * torch.randn(3, memory.interface_size).to(dtype)
            state, reads, allocates = memory(state, told)
            assert reads.dtype == dtype and reads.isfinite().all()
            for part in (state.usage, allocates):
                assert (part >= 0).all() and (part <= 1 + 1e-6).all()
            for part in (state.read_weights, state.write_weights, state.precedence):
                assert (part >= 0).all() and (part.sum(dim=-1) <= 1 + 1e-5).all()
            links = state.link
            # Rounding may leave a link a little below 0.
            assert links.min() >= -1e-6 and max(links.sum(dim=1).max(), links.sum(dim=2).max()) <= 1 + 1e-5
            assert (links.diagonal(dim1=1, dim2=2) == 0).all()
    modes = parse_interface(told.float(), 2, 4).modes
    torch.testing.assert_close(modes.sum(dim=-1), torch.ones(3, 2))


def test_half_precision_keeps_the_slots_in_full():
    cell, x = cell_of(), torch.randn(2, 5, 3)
    expected, _ = cell(x, num_slots=5)
    found, state = cell.bfloat16()(x.bfloat16(), num_slots=5)
    assert found.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in state)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    cell = cell.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, state = cell(x, num_slots=5)
    assert state.usage.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_writing_in_order_links_the_slots_in_order():
    memory = DNCMemory(1, 2)
    state = memory.initial_state(1, 5, torch.zeros(()))
    told = torch.zeros(1, memory.interface_size)
    told[:, -5:-3] = 50.0  # allocate and write
    told[:, -6] = -50.0  # free nothing
    written = []
    for _ in range(5):
        state, _, _ = memory(state, told)
        written.append(int(state.write_weights.argmax()))
    assert sorted(written) == list(range(5))
    expected = torch.zeros(1, 5, 5)
    expected[0, written[1:], written[:-1]] = 1
    torch.testing.assert_close(state.link, expected, rtol=0, atol=1e-4)
    last = torch.zeros(1, 5)
    last[0, written[-1]] = 1
    torch.testing.assert_close(state.precedence, last, rtol=0, atol=1e-4)
    torch.testing.assert_close(state.usage, 1 - last, rtol=0, atol=1e-4)


def test_links_on_edges_are_those_of_the_matrix(double):
    conv, slots = LinkConv(), 4
    edge_index = torch.tensor([[j for i in range(slots) for j in range(slots) if i != j],
                               [i for i in range(slots) for j in range(slots) if i != j]])  # fmt: skip
    old, write, last = torch.rand(slots, slots), torch.rand(slots), torch.rand(slots)
    dense = link(old[None], write[None], last[None])[0]
    found = conv.relink(old[edge_index[1], edge_index[0]], edge_index, write, last)
    torch.testing.assert_close(found, dense[edge_index[1], edge_index[0]])
    order = torch.randperm(edge_index.size(1))
    heads = torch.rand(slots, 2)
    heard = conv(heads, edge_index[:, order], found[order])
    torch.testing.assert_close(heard, dense @ heads)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DNCCell(3, 0), "hidden_channels"),
        (lambda: DNCCell(3, 4, heads=0), "heads"),
        (lambda: DNCCell(3, 4, slot_channels=0), "width"),
        (lambda: DNCCell(3, 4)(torch.zeros(1, 2, 3)), "num_slots"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_state_of_other_sizes_is_a_typed_error():
    memory = DNCMemory(2, 3)
    state = memory.initial_state(2, 5, torch.zeros(()))
    with pytest.raises(ConfigError, match="interface"):
        memory(SlotState(*state), torch.zeros(2, 7))
