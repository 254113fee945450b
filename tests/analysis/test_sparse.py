"""What the pictures of sparse layers say, and what they refuse."""

import numpy as np
import pytest
import yaml
from fake_run import texts
from safetensors.numpy import save_file

import analysis
from analysis.sparse import block_density, feeds
from graphmoe.checkpoint import read
from graphmoe.errors import CheckpointError

SIZES = [(12, 300), (300, 8)]


@pytest.fixture
def record(tmp_path):
    """Two layers of which the first hears the pixels of images of 3 x 4, after two rewirings."""
    random = np.random.default_rng(0)
    edges = []
    for layer, (sources, targets) in enumerate(SIZES):
        place = np.sort(random.choice(sources * targets, sources * targets // 4, replace=False))
        edges.append(np.stack([np.full_like(place, layer), place % sources, place // sources]))
    edges = np.concatenate(edges, axis=1).astype(np.int32)
    count = edges.shape[1]
    tensors = {
        "step": np.arange(1, 6) * 10,
        "sparse_edges": np.tile(np.array([900, 600]), (5, 1)),
        "sparse_survival": np.linspace([1, 1], [0.5, 0.7], 5).astype(np.float32),
        "final_feeds": edges,
        "final_feeds_weight": random.normal(size=count).astype(np.float32),
        "final_feeds_age": random.integers(0, 3, count),
        "final_feeds_size": np.array(SIZES),
        "final_image_shape": np.array([1, 3, 4]),
    }
    save_file(tensors, tmp_path / "records.safetensors", metadata={"recipe": "set_mnist"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"recipe": "set_mnist"}))
    return read(tmp_path)


def draw(record, name):
    return analysis.plots(record)[name](record)


def change(record, **arrays):
    return record._replace(records=record.records | arrays)


def test_a_sparse_run_has_its_pictures_and_a_dense_one_none(record):
    names = {"edge_survival", "edge_ages", "degree_distribution", "sparse_mask", "pixel_importance"}
    assert names <= set(analysis.plots(record))
    assert not names & set(analysis.plots(record._replace(records={})))
    other = change(record, final_image_shape=np.array([1, 5, 5]))
    assert "pixel_importance" not in analysis.plots(other)


def test_edges_over_time(record):
    figure = draw(record, "edge_survival")
    edges, left = figure.axes[:2]
    assert edges.lines[0].get_ydata() == pytest.approx([25.0] * 5) and edges.get_ylabel() == "density, %"
    assert edges.get_title() == "constant" and left.get_title().startswith("at the end 60 %")
    assert left.lines[1].get_ydata() == pytest.approx(100 * record.records["sparse_survival"][:, 1])
    moved = record.records["sparse_edges"].copy()
    moved[-1, 0] += 1
    assert draw(change(record, sparse_edges=moved), "edge_survival").axes[0].get_title() == "NOT constant"


def test_ages_are_shares_of_a_layer(record):
    lines = draw(record, "edge_ages").axes[0].lines
    for layer, line in zip(feeds(record), lines, strict=True):
        assert line.get_ydata() == pytest.approx([(layer.age == age).mean() for age in range(3)])
    aged = np.where(record.records["final_feeds_age"] == 1, 2, record.records["final_feeds_age"])
    assert np.isnan(draw(change(record, final_feeds_age=aged), "edge_ages").axes[0].lines[0].get_ydata()[1])


def test_degrees_are_counted_beside_chance(record):
    figure = draw(record, "degree_distribution")
    assert len(figure.axes) == 4 and "at random" in texts(figure)
    for ax, neurons in zip(figure.axes, (12, 300, 300, 8), strict=True):
        assert sum(patch.get_height() for patch in ax.patches) == neurons
    # Of edges into 300 targets, each from 12 sources with a chance of a quarter.
    ax = figure.axes[1]
    at = dict(zip(*ax.lines[0].get_data(), strict=True))
    assert min(at) == np.bincount(feeds(record)[0].target, minlength=300).min()
    assert at[3] == pytest.approx(300 * 220 * 0.25**3 * 0.75**9, rel=1e-6)


def test_masks_count_the_places_of_a_block(record):
    first, second = feeds(record)
    assert block_density(second).shape == (8, 128) and block_density(first).shape == (128, 12)
    assert set(np.unique(block_density(first)[:3])) <= {0, 1 / 3, 1 / 2, 2 / 3, 1}
    small = first._replace(
        target=first.target[first.target < 8], source=first.source[first.target < 8], size=(12, 8)
    )
    dense = np.zeros((8, 12))
    dense[small.target, small.source] = 1
    assert np.array_equal(block_density(small), dense)
    axes = draw(record, "sparse_mask").axes[:2]
    assert [ax.images[0].norm.vmax for ax in axes] == [100, 100 * block_density(second).max()]
    titles = [ax.get_title() for ax in axes]
    assert titles == ["layer 0: 900 edges, 25.00 %", "layer 1: 600 edges, 25.00 %"]


def test_pixels_are_the_sources_of_the_first_layer(record):
    figure, layer = draw(record, "pixel_importance"), feeds(record)[0]
    degree, strength = (ax.images[0].get_array() for ax in figure.axes[:2])
    assert degree.shape == (3, 4) and degree.sum() == 900 and degree[1, 2] == (layer.source == 6).sum()
    assert strength[2, 3] == pytest.approx(np.abs(layer.weight[layer.source == 11]).sum(), rel=1e-5)
    assert "edges; 75.0 would be even" in texts(figure)


BAD = {
    "final_feeds": [
        np.zeros((2, 5), np.int32),
        np.full((3, 1500), 400, np.int32),
        np.zeros((3, 1500), np.float32),
    ],
    "final_feeds_weight": [np.zeros(3, np.float32), np.full(1500, np.nan, np.float32)],
    "final_feeds_age": [np.full(1500, -1), np.zeros(1500, np.float32)],
    "final_feeds_size": [np.array([[12, 300]]), np.array([[12, 10], [300, 8]]), np.array([12, 300])],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_edges_that_are_none_are_an_error(record, name, value):
    with pytest.raises(CheckpointError, match="edges cannot be drawn"):
        draw(change(record, **{name: value}), "sparse_mask")
