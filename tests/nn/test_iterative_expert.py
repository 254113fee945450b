import pytest
import reference
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import ConfigError
from graphmoe.nn import ExpertConv, IterativeExpert, TopKRouter, edge_form


def routes(num_tokens, num_experts, k, x):
    r = TopKRouter(6, num_experts, k)(x.detach(), mask=torch.arange(num_tokens) != 3)
    return r, torch.stack([r.token, torch.arange(len(r.token))])


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("num_tokens, num_experts, k", [(1, 1, 1), (7, 3, 2), (0, 4, 2)])
def test_edge_form_equals_fast_form(steps, num_tokens, num_experts, k, double):
    conv = IterativeExpert(6, 10, num_experts, steps=steps)
    x = torch.randn(num_tokens, 6, requires_grad=True)
    r, edges = routes(num_tokens, num_experts, k, x)

    def edge():
        with edge_form(conv):
            return conv(x, edges, r.expert, r.ptr, r.perm)

    assert_same(conv, [x], lambda: conv(x, edges, r.expert, r.ptr, r.perm), edge)
    assert_same(conv, [x], lambda: conv(x, edges, r.expert, r.ptr), edge)


@pytest.mark.parametrize("steps", [1, 3])
def test_oracle(steps, double):
    conv = IterativeExpert(4, 3, 2, steps=steps)
    x = torch.randn(3, 4)
    expert = torch.tensor([1, 0, 2, 1])  # row 2 is absent
    out = conv(x, torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]]), expert)
    for row, token in ((0, 0), (1, 1), (3, 2)):
        e = expert[row]
        h = x[token]
        for _ in range(steps):
            h = h + reference.expert(h + x[token], conv.gate_up_proj[e], conv.down_proj[e]) / steps**0.5
        torch.testing.assert_close(out[row], h - x[token])
    assert (out[2] == 0).all()


def test_absent_rows_are_zero_in_the_fast_form_too(double):
    conv, x = IterativeExpert(6, 5, 3, steps=3), torch.randn(6, 6)
    r, edges = routes(6, 3, 2, x)
    rows = conv(x, edges, r.expert, r.ptr, r.perm)
    absent = r.expert == 3
    assert absent.sum() == 2 and (rows[absent] == 0).all() and rows[~absent].abs().min() > 0


def test_fewer_steps_are_the_same_loop_left_early(double):
    """Three of four steps, computed as the first three of the long loop."""
    conv, x = IterativeExpert(4, 3, 1, steps=4), torch.randn(5, 4)
    edges, expert = torch.stack([torch.arange(5)] * 2), torch.zeros(5, dtype=torch.long)
    ptr = torch.tensor([0, 5])
    after = {s: conv(x, edges, expert, ptr, steps=s) for s in (3, 4)}
    plain = ExpertConv(4, 3, 1)
    plain.load_state_dict(conv.state_dict())
    last = plain(2 * x + after[3], edges, expert, ptr) / 2  # 4 ** -0.5
    torch.testing.assert_close(after[4], after[3] + last)
    with edge_form(conv):
        torch.testing.assert_close(conv(x, edges, expert, ptr, steps=3), after[3])


def test_reduced_equals_the_weighted_sum_of_rows(double):
    conv, x = IterativeExpert(6, 5, 3, steps=2), torch.randn(7, 6)
    r, edges = routes(7, 3, 2, x)
    rows = conv(x, edges, r.expert, r.ptr, r.perm)
    want = torch.zeros(7, 6).index_add(0, r.token, rows * r.weight.unsqueeze(1))
    torch.testing.assert_close(conv.reduce(x, r.token, r.weight, r.ptr, r.perm), want)


def test_contract():
    conv, x = IterativeExpert(6, 5, 3, steps=2), torch.randn(40, 6)
    r, edges = routes(40, 3, 2, x)
    assert_state_round_trip(conv, IterativeExpert(6, 5, 3), lambda c: c(x, edges, r.expert, r.ptr, r.perm))
    assert_every_parameter_learns(conv, conv(x, edges, r.expert, r.ptr, r.perm).pow(3).sum())
    want = "IterativeExpert(6, hidden_channels=5, num_experts=3, activation='swiglu', steps=2)"
    assert repr(conv) == want


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    with pytest.raises(ConfigError, match="reasoning_steps: no step of reasoning; expected at least 1"):
        IterativeExpert(6, 5, 3, steps=steps)
    conv, x = IterativeExpert(6, 5, 3), torch.randn(4, 6)
    r, edges = routes(4, 3, 2, x)
    with pytest.raises(ConfigError, match="reasoning_steps"):
        conv(x, edges, r.expert, r.ptr, steps=steps)
