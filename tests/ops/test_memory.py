import copy
import io
import os
import threading

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from graphmoe.ops import grouped_mlp, memory
from graphmoe.ops.memory import LARGE, Blocks, empty

MIB = 1 << 20

pytestmark = pytest.mark.skipif(memory._BLOCKS is None, reason="blocks are made on Linux only")


@pytest.fixture
def blocks(monkeypatch):
    found = Blocks(64 * MIB)
    monkeypatch.setattr(memory, "_BLOCKS", found)
    return found


@pytest.fixture
def mapped(monkeypatch):
    """Sizes of the blocks that the system was asked for."""
    sizes, make = [], memory._map
    monkeypatch.setattr(memory, "_map", lambda size: sizes.append(size) or make(size))
    return sizes


def large(dtype=torch.float32, mib=8):
    return empty(torch.empty(0, dtype=dtype), 2, mib * MIB // 2 // dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 5), (3, 7), (2, 1100, 1101)])
def test_contract(blocks, dtype, shape):
    out = empty(torch.empty(2, dtype=dtype), *shape)
    assert out.shape == shape and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
    assert not out.requires_grad and not out._is_view()
    assert out.untyped_storage().nbytes() == out.nbytes  # what a file of it would hold
    out.fill_(3)
    assert (out == 3).all()
    del out
    assert (blocks.free() > 0) is (dtype.itemsize * torch.Size(shape).numel() >= LARGE)


def test_other_devices_and_systems_get_what_torch_gives(blocks, monkeypatch, mapped):
    assert empty(torch.empty(0, device="meta"), 4096, 4096).device.type == "meta"
    monkeypatch.setattr(memory, "_BLOCKS", None)
    assert large().untyped_storage().resizable()
    assert not mapped


def test_without_memory_torch_is_asked(blocks, monkeypatch):
    def none_left(size):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "_map", none_left)
    assert large().untyped_storage().resizable()


def test_a_block_comes_back_with_the_last_view_of_its_tensor(blocks, mapped):
    first = large()
    place, row = first.data_ptr(), first[1]
    array = first[0].numpy()
    del first
    assert large().data_ptr() != place and len(mapped) == 2
    del row
    assert large().data_ptr() != place
    array[:] = 1.0
    del array
    assert {large().data_ptr(), large(torch.bfloat16).data_ptr()} <= {place, large().data_ptr()}
    both = large(), large()
    assert place in [tensor.data_ptr() for tensor in both] and len(mapped) == 2


def test_tensors_that_live_share_nothing(blocks):
    tensors = [large().fill_(number) for number in range(6)]
    del tensors[2:4]
    tensors += [large().fill_(number) for number in (6, 7, 8)]
    for tensor, number in zip(tensors, (0, 1, 4, 5, 6, 7, 8), strict=True):
        assert (tensor == number).all()


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, 5 * MIB, 33 * MIB - 5, 100 * MIB + 1, 3 << 30])
def test_sizes_are_few_and_little_is_lost(size):
    rounded = memory._rounded(size)
    assert size <= rounded <= max(size * 9 / 8, size + 2 * MIB)
    assert rounded % (2 * MIB) == 0 and memory._rounded(rounded) == rounded


def test_the_oldest_blocks_go_when_too_many_wait(blocks, mapped):
    held = [large(mib=size) for size in (16, 20, 24, 28)]
    while held:
        del held[0]  # the 16 first
        assert blocks.free() <= 64 * MIB
    assert blocks.free() == (24 + 28) * MIB
    again = [large(mib=28), large(mib=24)]
    assert len(mapped) == 4
    again.append(large(mib=20))
    assert mapped[4:] == [20 * MIB]
    blocks.clear()
    assert blocks.free() == 0
    huge = large(mib=80)
    del huge
    assert blocks.free() == 0


def test_nobody_waits_for_the_lock(blocks, mapped):
    """A finalizer may run while its own thread is in the middle of a method."""
    tensor = large()
    place = tensor.data_ptr()
    with blocks._lock:
        del tensor
        assert blocks.free() == 8 * MIB
        other = large()
        assert other.data_ptr() != place
    assert large().data_ptr() == place and len(mapped) == 2


def test_threads(blocks):
    wrong = []

    def work(number):
        for _ in range(30):
            pair = large(mib=4).fill_(number), large(mib=5).fill_(number)
            wrong.extend(tensor for tensor in pair if not (tensor == number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < blocks.free() <= 64 * MIB


def test_a_forked_process_has_memory_of_its_own():
    tensor, waiting = large().fill_(1), large()
    del waiting
    with memory._BLOCKS._lock:  # held by a thread that the child does not have
        child = os.fork()
        if child == 0:
            status = 1
            try:
                tensor.fill_(2)
                mine = [large().fill_(3) for _ in range(3)]
                del mine[0]
                reused = memory._BLOCKS.free() > 0
                status = 0 if reused and (tensor == 2).all() and (mine[0] == 3).all() else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tensor == 1).all()


def test_like_any_other_tensor(blocks):
    tensor = large().copy_(torch.arange(2 * MIB, dtype=torch.float32).view(2, -1))
    copies = [copy.deepcopy(tensor), load(save({"x": tensor[1]}))["x"], tensor.clone()]
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < tensor.nbytes + 10_000
    file.seek(0)
    copies.append(torch.load(file, weights_only=True))
    assert all(torch.equal(other, tensor[1] if other.dim() == 1 else tensor) for other in copies)
    copies[0].zero_()
    assert tensor[1, 1] == MIB + 1
    torch.mul(tensor[0], 2.0, out=tensor[1])
    assert torch.equal(tensor[1], 2 * tensor[0])
    kept = tensor.clone()
    assert torch.equal(tensor.share_memory_(), kept) and tensor.is_shared()
    with torch.inference_mode(), torch.device("cpu"):
        assert large().is_inference()
    with pytest.raises(RuntimeError, match="not resizable"):
        large().resize_(4 * MIB)
    assert large().resize_(3, 4).shape == (3, 4)  # smaller is possible


def test_a_leaf_of_it_learns(blocks):
    weight = nn.Parameter(large(mib=4).normal_())
    before = weight.detach().clone()
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * before)
    torch.optim.SGD([weight], lr=0.1).step()
    assert not torch.equal(weight, before)


def test_outputs_may_be_changed_in_place(blocks):
    """Autograd forbids that for views which an operator returns."""
    x = torch.randn(8192, 128, requires_grad=True)
    weights = torch.randn(2, 16, 128, requires_grad=True), torch.randn(2, 128, 8, requires_grad=True)
    out = grouped_mlp(x, *weights, torch.tensor([0, 5000, 8192]))
    assert not out.untyped_storage().resizable()
    out += x
    out.sum().backward()
    assert (x.grad - 1).abs().max() > 0


def test_training_asks_the_system_once(blocks, mapped):
    """Gradients and hidden rows of a step are those of the step before."""
    x = torch.randn(512, 64, requires_grad=True)
    weights = [
        nn.Parameter(torch.randn(8, 4096, 64) / 8),
        nn.Parameter(torch.randn(8, 64, 2048) / 45),
    ]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        asked = len(mapped)
        ends = torch.randint(1, 512, (7,), generator=generator).sort().values
        ptr = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([512])])
        out = grouped_mlp(x, *weights, ptr)
        out.square().mean().backward()
        assert weights[0].grad.untyped_storage().resizable() is False
        optimizer.step()
        optimizer.zero_grad()
        found.append(len(mapped) - asked)
        del out
    assert found[0] >= 3 and sum(found[3:]) == 0, found
