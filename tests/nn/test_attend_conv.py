import pytest
import torch
from contract import assert_same

from graphmoe.errors import ConfigError
from graphmoe.graph import causal, complete
from graphmoe.nn import AttendConv, edge_form, rotary


def angles(length, channels, start=0):
    return rotary(torch.arange(start, start + length).unsqueeze(0), channels)


class Cache:
    def __init__(self):
        self.kept = None

    def update(self, key, value, layer):
        if self.kept is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.kept, (key, value), strict=True))
        self.kept = (key, value)
        return self.kept


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 6])
def test_edge_form_equals_fast_form(kv_heads, length, double):
    conv = AttendConv(16, 4, kv_heads=kv_heads)
    x = torch.randn(3, length, 16, requires_grad=True)
    position = angles(length, 4)

    def edge():
        with edge_form(conv):
            return conv(x, position=position)

    assert_same(conv, [x], lambda: conv(x, position=position), edge)


def test_node_form_equals_sequence_form(double):
    conv = AttendConv(16, 4, kv_heads=2)
    x = torch.randn(2, 5, 16)
    position = tuple(a.expand(2, 5, -1).flatten(0, 1) for a in angles(5, 4))
    flat = conv(x.flatten(0, 1), causal(2, 5), position)
    torch.testing.assert_close(flat.view(2, 5, 16), conv(x, position=angles(5, 4)))


def test_masked_edges_equal_masked_sdpa(double):
    conv = AttendConv(8, 2)
    x = torch.randn(2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).clone()
    mask[0, :, 1:, 0] = False
    fast = conv(x, mask=mask)
    with edge_form(conv):
        torch.testing.assert_close(conv(x, mask=mask), fast)


@pytest.mark.parametrize("chunks", [(1,) * 7, (3, 3, 1), (7,), (4, 1, 2)])
@pytest.mark.parametrize("fuse", [True, False])
def test_chunks_through_a_cache_equal_one_pass(chunks, fuse, double):
    conv = AttendConv(16, 4, kv_heads=2)
    conv.fuse = fuse
    x = torch.randn(2, 7, 16)
    whole = conv(x, position=angles(7, 4))
    cache, start, parts = Cache(), 0, []
    for size in chunks:
        part = x[:, start : start + size]
        parts.append(conv(part, position=angles(size, 4, start), cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_attention_weights_sum_to_one_and_isolated_nodes_get_zero(double):
    conv = AttendConv(8, 2)
    x = torch.randn(4, 8)
    edges = torch.tensor([[0, 1, 2], [1, 1, 2]])
    out, (index, alpha) = conv(x, edges, return_attention_weights=True)
    total = torch.zeros(4, 2).index_add(0, index[1], alpha)
    torch.testing.assert_close(total[1:3], torch.ones(2, 2))
    assert (out[[0, 3]] == 0).all()


def test_rotary_depends_on_distance_only(double):
    from graphmoe.nn.attend import rotate

    query, key = torch.randn(2, 8)
    near = rotate(query, *rotary(torch.tensor(2), 8)) @ rotate(key, *rotary(torch.tensor(7), 8))
    far = rotate(query, *rotary(torch.tensor(102), 8)) @ rotate(key, *rotary(torch.tensor(107), 8))
    torch.testing.assert_close(near, far)


def test_heads_must_divide():
    with pytest.raises(ConfigError, match=r"heads: heads must divide the channels.*got 3"):
        AttendConv(16, 3)
    with pytest.raises(ConfigError, match=r"kv_heads.*a divisor of 4; got 3"):
        AttendConv(16, 4, kv_heads=3)


def test_without_causal_every_token_hears_all_of_its_sequence(double):
    conv = AttendConv(16, 4, kv_heads=2, causal=False)
    x = torch.randn(2, 5, 16, requires_grad=True)
    position = angles(5, 4)

    def edge():
        with edge_form(conv):
            return conv(x, position=position)

    assert_same(conv, [x], lambda: conv(x, position=position), edge)
    nodes = tuple(a.expand(2, 5, -1).flatten(0, 1) for a in position)
    pairs = complete(5, loops=True)
    both = torch.cat([pairs, pairs + 5], dim=1)
    flat = conv(x.flatten(0, 1), both, nodes)
    torch.testing.assert_close(flat.view(2, 5, 16), conv(x, position=position))
    assert torch.autograd.grad(conv(x, position=position)[0, 0].sum(), x)[0][0].abs().sum(dim=1).min() > 0


def test_without_causal_a_mask_leaves_the_present_tokens(double):
    conv = AttendConv(8, 2, causal=False)
    x = torch.randn(3, 5, 8, requires_grad=True)
    present = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    mask = present.view(3, 1, 1, 5).expand(3, 1, 5, 5)

    def edge():
        with edge_form(conv):
            return conv(x, mask=mask)

    assert_same(conv, [x], lambda: conv(x, mask=mask), edge)
    out = conv(x, mask=mask)
    torch.testing.assert_close(out[0, :3], conv(x[:1, :3])[0])
    torch.testing.assert_close(out[1, 1:], conv(x[1:2, 1:])[0])
    assert (out[2] == 0).all()


def test_without_causal_there_is_no_cache():
    with pytest.raises(ConfigError, match=r"cache: tokens that look ahead.*got 'Cache'"):
        AttendConv(8, 2, causal=False)(torch.randn(1, 3, 8), cache=Cache())


def test_values_of_a_sparse_matrix_are_ignored():
    conv, x = AttendConv(8, 2), torch.randn(4, 8)
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    adj_t = torch.sparse_coo_tensor(edges.flip(0), torch.rand(5) + 0.1, (4, 4)).coalesce()
    torch.testing.assert_close(conv(x, adj_t), conv(x, edges))
