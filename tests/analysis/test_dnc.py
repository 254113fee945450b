import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import analysis
from analysis.dnc import dnc_links, dnc_memory, has_dnc
from graphmoe.checkpoint import read
from graphmoe.errors import CheckpointError

STEPS, SLOTS, HEADS = 7, 5, 2


def write(path, **changed):
    """A computer that writes slots 4, 3, 2 and reads them in that order."""
    path.mkdir()
    written, read_at = np.zeros((STEPS, SLOTS), np.float32), np.zeros((STEPS, HEADS, SLOTS), np.float32)
    link = np.zeros((SLOTS, SLOTS), np.float32)
    for step, slot in enumerate((4, 3, 2)):
        written[step, slot] = 1
        read_at[4 + step, :, slot] = 1
        if step:
            link[slot, slot + 1] = 1
    arrays = {
        "input": np.zeros((STEPS, 3), np.float32),
        "asked": (np.arange(STEPS) > 3).astype(np.float32),
        "output": np.full((STEPS, 2), 0.5, np.float32),
        "usage": written.cumsum(axis=0),
        "write": written,
        "read": read_at,
        "allocates": (np.arange(STEPS) < 3).astype(np.float32),
        "link": link,
        "wrong": np.array([1, 6]),
    }
    arrays |= changed
    tensors = {f"final_dnc_{name}": array for name, array in arrays.items() if array is not None}
    save_file(
        tensors | {"step": np.array([1])}, path / "records.safetensors", metadata={"recipe": "dnc_copy"}
    )
    (path / "config.yaml").write_text("recipe: dnc_copy\n")
    (path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 0.5}) + "\n")
    return read(path)


def images(fig):
    return [np.asarray(image.get_array()) for ax in fig.axes for image in ax.get_images()]


def test_slots_are_drawn_in_the_order_of_writing(tmp_path):
    record = write(tmp_path / "run")
    assert has_dnc(record) and {"dnc_memory", "dnc_links"} <= set(analysis.plots(record))
    fig = dnc_memory(record)
    assert "1 of 6 answers wrong" in fig.get_suptitle()
    shown = images(fig)
    assert len(shown) == 4 + HEADS
    written = shown[3]
    np.testing.assert_array_equal(written[:3, :3], np.eye(3))
    assert not written[3:].any()
    for read_by_head in shown[4:]:
        np.testing.assert_array_equal(read_by_head[:3, 4:], np.eye(3))


def test_links_lie_below_the_diagonal(tmp_path):
    (shown, *_) = images(dnc_links(write(tmp_path / "run")))
    np.testing.assert_array_equal(shown, np.eye(3, k=-1))


def test_a_memory_that_was_never_written(tmp_path):
    record = write(tmp_path / "run", write=np.zeros((STEPS, SLOTS), np.float32))
    assert images(dnc_links(record))[0].shape == (SLOTS, SLOTS)
    assert len(images(dnc_memory(record))) == 4 + HEADS


def test_without_its_arrays_nothing_is_offered(tmp_path):
    assert not has_dnc(write(tmp_path / "run", link=None))


@pytest.mark.parametrize("name", ["usage", "link", "read", "allocates"])
def test_arrays_that_do_not_fit(name, tmp_path):
    record = write(tmp_path / "run", **{name: np.zeros((2, 2, 2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=f"final_dnc_{name}"):
        dnc_memory(record)
