"""Images: what is read from folders, what is refused, batches that depend on seed and step only."""

import gzip
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from graphmoe.data import ImageBatches, load_images
from graphmoe.data.image_files import read_idx
from graphmoe.errors import DataError

STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def arrays(count=12, side=6, *, colours=None, seed=0):
    random = np.random.default_rng(seed)
    shape = (count, side, side) if colours is None else (count, side, side, colours)
    return random.integers(0, 256, shape, dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """MNIST's files, some of them zipped, with 12 and 5 images."""
    (tmp_path / "mnist").mkdir()
    for stem, array in zip(STEMS, (*arrays(), *arrays(5, seed=1)), strict=True):
        zipped = "images" in stem
        path = tmp_path / "mnist" / (stem + ".gz" * zipped)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return tmp_path


def test_the_first_images_only(folder):
    data = load_images("mnist", folder, train_images=8, test_images=2, validation=0.25)
    images, _ = arrays()
    both = np.concatenate([data.train.images, data.validation.images])[:, 0]
    assert sorted(both.sum((1, 2))) == sorted(images[:8].sum((1, 2))) and len(data.validation) == 2
    assert data.test.labels.tolist() == [0, 1] and data.mean == data.train.images.mean()
    for options in ({"train_images": 13}, {"test_images": 0}):
        with pytest.raises(DataError, match=f"--{next(iter(options))}: no number of images"):
            load_images("mnist", folder, **options)


def test_the_files_of_mnist(folder):
    for where in (folder, folder / "mnist"):
        data = load_images("mnist", where)
        images, labels = arrays()
        assert np.array_equal(data.train.images, images[:, None]) and np.array_equal(
            data.train.labels, labels
        )
        assert np.array_equal(data.test.images[:, 0], arrays(5, seed=1)[0]) and not len(data.validation)
        assert data.class_names == tuple("0123456789") and data.image_shape == (1, 6, 6)
        assert data.mean == pytest.approx(images.mean()) and data.std == pytest.approx(images.std())
        assert abs(data.normalise(data.train.images).mean()) < 1e-5
        assert data.majority() == 0.2
        assert data.describe() == "mnist: images 6 x 6 x 1, 10 classes; 12 train, 0 validation, 5 test"


@pytest.mark.parametrize("colours", [None, 3])
def test_arrays_of_numpy(tmp_path, colours):
    parts = (*arrays(colours=colours), *arrays(5, colours=colours, seed=1))
    keys = ("x_train", "y_train", "x_test", "y_test")
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / "cifar10" / "cifar10_other.npz", train_jpeg=np.zeros(3))
    np.savez(tmp_path / "cifar10" / "cifar10_part.npz", **dict(zip(keys, parts, strict=True)))
    data = load_images("cifar10", tmp_path)
    assert data.image_shape == (colours or 1, 6, 6) and data.class_names[3] == "cat"
    expected = parts[0][:, None] if colours is None else parts[0].transpose(0, 3, 1, 2)
    assert np.array_equal(data.train.images, expected)


def test_digits_are_divided_by_their_seed():
    first, again, other = (load_images("digits", validation=0.1, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert [len(part) for part in (first.train, first.validation, first.test)] == [1295, 143, 359]
    assert first.image_shape == (1, 8, 8) and first.train.images.max() == 255


def test_real_images(data_dir):
    data = load_images("mnist", data_dir)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.mean / 255 == pytest.approx(0.1307, abs=1e-4) and data.std / 255 == pytest.approx(
        0.3081, abs=1e-4
    )
    assert len(load_images("fashion_mnist", data_dir).test) == 2_000
    assert load_images("cifar10", data_dir).image_shape == (3, 32, 32)


def test_batches_depend_on_the_seed_and_the_index_only(folder):
    data = load_images("mnist", folder)
    batches, again = (ImageBatches(data, seed=3, shift=1) for _ in range(2))
    whole = [batches.batch(index, 4, slice(0, 4)) for index in range(7)]
    for index in (5, 0, 6, 2):
        for slots in (slice(0, 2), slice(2, 4)):
            for part, all_rows in zip(again.batch(index, 4, slots), whole[index], strict=True):
                assert np.array_equal(part, all_rows[slots])
    assert batches.steps_per_epoch(4) == 3
    for epoch in (whole[:3], whole[3:6]):
        assert sorted(np.concatenate([labels for _, labels in epoch])) == sorted(data.train.labels)
    other = ImageBatches(data, seed=4, shift=1).batch(0, 4, slice(0, 4))
    assert not np.array_equal(other[0], whole[0][0])


def test_images_are_moved_by_at_most_the_shift(folder):
    data = load_images("mnist", folder)
    plain, shifted = ImageBatches(data, seed=3), ImageBatches(data, seed=3, shift=1)
    seen = set()
    for index in range(30):
        for image, moved in zip(
            plain.batch(index, 4, slice(0, 4))[0], shifted.batch(index, 4, slice(0, 4))[0], strict=True
        ):
            padded = np.pad(image[0], 1, constant_values=-data.mean / data.std)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (6, 6))
            fits = np.argwhere(np.isclose(windows, moved[0], atol=1e-5).all((2, 3))).tolist()
            assert len(fits) == 1
            seen.add(tuple(fits[0]))
    assert len(seen) == 9


def test_some_images_are_mirrored(folder):
    data = load_images("mnist", folder)
    plain, flipped = ImageBatches(data, seed=3), ImageBatches(data, seed=3, flip=True)
    mirrored = []
    for index in range(10):
        slots = slice(0, 4)
        for image, turned in zip(
            plain.batch(index, 4, slots)[0], flipped.batch(index, 4, slots)[0], strict=True
        ):
            mirrored.append(np.array_equal(turned, image[..., ::-1]))
            assert mirrored[-1] or np.array_equal(turned, image)
        parts = [flipped.batch(index, 4, slice(start, start + 2))[0] for start in (0, 2)]
        assert np.array_equal(np.concatenate(parts), flipped.batch(index, 4, slots)[0])
    assert 10 <= sum(mirrored) <= 30


def damaged(folder, change):
    path = folder / "mnist" / STEMS[1]
    path.write_bytes(change(path.read_bytes()))
    return load_images("mnist", folder)


BAD = {
    "unknown images": lambda folder: load_images("letters", folder),
    "no share of the images": lambda folder: load_images("digits", validation=1.0),
    "not part of this package": lambda folder: load_images("mnist"),
    "no cifar10 here": lambda folder: load_images("cifar10", folder),
    "cut off or too long": lambda folder: damaged(folder, lambda data: data[:-1]),
    "cut off": lambda folder: damaged(folder, lambda data: data[:4] + b"\xff" * 4 + data[8:]),
    "not an IDX file": lambda folder: damaged(folder, lambda data: b"PK" + data[2:]),
    "arrays of another shape": lambda folder: damaged(folder, lambda data: idx(np.zeros(3, np.uint8))),
    "label of no class": lambda folder: damaged(folder, lambda data: idx(np.full(12, 10, np.uint8))),
    "no shift": lambda folder: ImageBatches(load_images("mnist", folder), shift=6),
    "fewer images than a batch": lambda folder: ImageBatches(load_images("mnist", folder)).batch(
        0, 13, slice(0, 13)
    ),
}


@pytest.mark.parametrize("match", BAD)
def test_what_is_refused(folder, match):
    with pytest.raises(DataError, match=match):
        BAD[match](folder)


def test_damaged_archives(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(1000))[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "x.gz", 1)
    (tmp_path / "cifar10.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load_images("cifar10", tmp_path)
    objects = np.array([{}], dtype=object)
    np.savez(tmp_path / "cifar10.npz", x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    with pytest.raises(DataError, match="cannot be read"):
        load_images("cifar10", tmp_path)


class Image:
    """The feature of a column of pictures."""


def picture_rows(count, shape, *, names=("cat", "dog")):
    pictures = [np.full(shape, index, np.uint8) for index in range(count)]
    columns = {"img": pictures, "label": [index % 2 for index in range(count)]}
    features = {"img": Image(), "label": SimpleNamespace(names=list(names))}
    return SimpleNamespace(features=features, columns=columns)


class Split:
    def __init__(self, rows):
        self.features, self.columns = rows.features, rows.columns

    def __getitem__(self, column):
        return self.columns[column]


@pytest.fixture
def hub(monkeypatch):
    """Serves splits under whatever name is asked for."""

    def serve(**splits):
        asked = []

        def load_dataset(path, config=None):
            asked.append(path)
            return {name: Split(rows) for name, rows in splits.items()}

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return serve


@pytest.mark.parametrize("shape, colours", [((4, 5), 1), ((4, 5, 3), 3)])
def test_images_of_the_hub(hub, shape, colours):
    asked = hub(train=picture_rows(6, shape), test=picture_rows(3, shape))
    for name, place in (("cifar10", "uoft-cs/cifar10"), ("someone/pictures", "someone/pictures")):
        data = load_images(name, validation=0.4)
        assert asked.pop() == place and not asked
        assert data.image_shape == (colours, 4, 5) and data.class_names == ("cat", "dog")
        assert [len(part) for part in (data.train, data.validation, data.test)] == [4, 2, 3]
        assert data.test.labels.tolist() == [0, 1, 0]
        assert data.test.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_images_of_the_hub_that_cannot_be_used(hub):
    small, large = picture_rows(3, (4, 4)), picture_rows(3, (5, 5))
    hub(train=small)
    with pytest.raises(DataError, match="a/b: the data set lacks a split; expected test"):
        load_images("a/b")
    large.columns["img"][0] = small.columns["img"][0]
    hub(train=small, test=large)
    with pytest.raises(DataError, match="a/b, split test: images of different sizes"):
        load_images("a/b")
    del small.features["img"]
    hub(train=small, test=small)
    with pytest.raises(DataError, match="a/b: no telling images from classes"):
        load_images("a/b")
    with pytest.raises(DataError, match="mnist is not part of this package, and the hub does not give it"):
        load_images("mnist")
