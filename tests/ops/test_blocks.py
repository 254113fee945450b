import pytest
import torch

from graphmoe.ops.blocks import BLOCK, blocks, fills_blocks, tokens_per_block


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_blocks_cover_every_token_once_and_fit(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.empty(5000, 3, 256)
    assert tokens_per_block(x) == min(threads * BLOCK // (3 * 256 * 4), 5000)
    parts = list(blocks(x))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(5000))
    assert all(part.stop - part.start <= tokens_per_block(x) for part in parts)


def test_a_token_larger_than_a_block_is_a_block():
    x = torch.empty(2, 3, BLOCK)
    assert tokens_per_block(x) == 1 and len(list(blocks(x))) == 2
    assert list(blocks(torch.empty(0, 3, 4))) == []


def test_a_quarter_of_a_block_is_enough():
    assert fills_blocks(torch.empty(BLOCK // 16)) and not fills_blocks(torch.empty(BLOCK // 16 - 1))
    assert fills_blocks(torch.empty(BLOCK // 32, dtype=torch.float64))
