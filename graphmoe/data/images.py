"""Labelled images: those of scikit-learn, or others from a folder or the Hugging Face hub."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphmoe.data.image_files import LabelledImages, pair, present, read_idx, read_npz
from graphmoe.data.image_hub import hub_images
from graphmoe.errors import DataError

FOLDERS = ("mnist", "fashion_mnist", "cifar10")
DATASETS = ("digits", *FOLDERS)
_IDX = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_NAMES = {"fashion_mnist": _CLOTHES, "cifar10": _THINGS}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images to train on, to look at while training, and to report on.

    Attributes:
        name: Of the data set.
        class_names: Name of each class.
        train, validation, test: The parts; ``validation`` may be empty.
        mean, std: Of the training images, of all pixels, for inputs near 0.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    mean: float
    std: float

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Colours, height and width."""
        return self.train.images.shape[1:]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(np.ascontiguousarray(part.images))
            digest.update(np.ascontiguousarray(part.labels))
        return digest.hexdigest()

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """Images as float32 inputs."""
        return (images.astype(np.float32) - np.float32(self.mean)) * np.float32(1 / self.std)

    def majority(self) -> float:
        """Share of the test part that has the most frequent class of the training part."""
        most = np.bincount(self.train.labels).argmax()
        return float((self.test.labels == most).mean())

    def describe(self) -> str:
        """One plain line."""
        colours, height, width = self.image_shape
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in ("train", "validation", "test"))
        return f"{self.name}: images {height} x {width} x {colours}, {len(self.class_names)} classes; {sizes}"


def load_images(
    name: str,
    data_dir: str | Path | None = None,
    *,
    validation: float = 0.0,
    seed: int = 0,
    train_images: int | None = None,
    test_images: int | None = None,
) -> ImageData:
    """Read a data set of images.

    ``digits`` (8 x 8, 1,797 images) comes with scikit-learn; a fifth of it, drawn by ``seed``, is the test
    part. The others have a test part of their own.

    Args:
        name: ``digits``, ``mnist``, ``fashion_mnist`` or ``cifar10``, or ``"owner/name"`` on the hub.
        data_dir: Folder that holds, itself or in a folder of that name, the four IDX files of MNIST or
            Fashion-MNIST, zipped or not; or one ``.npz`` with ``x_train``, ``y_train``, ``x_test``,
            ``y_test`` and maybe ``label_names``. Without it they come from the Hugging Face hub.
        validation: Share of the training images to set apart, drawn by ``seed``, in [0, 1).
        seed: Of the division.
        train_images, test_images: Read only so many, the first in their order.

    Raises:
        DataError: An unknown name, a folder without the files, files of something else, or more images asked
            for than there are.
    """
    if name not in DATASETS and "/" not in name:
        raise DataError("unknown images", "--dataset", f"one of {', '.join(DATASETS)}", name)
    if not 0 <= validation < 1:
        raise DataError("no share of the images", "--validation", "from 0 on, below 1", validation)
    random = np.random.default_rng(np.random.SeedSequence([seed]))
    if name == "digits":
        train, test, names = _digits(random)
    else:
        train, test, names = _hub(name) if data_dir is None or "/" in name else _folder(name, data_dir)
    train, test = train.first(train_images, "--train_images"), test.first(test_images, "--test_images")
    for part, where in ((train, "train"), (test, "test")):
        if not len(part):
            raise DataError("no image", where, "at least one")
        if part.labels.min() < 0 or part.labels.max() >= len(names):
            raise DataError("label of no class", where, f"0 to {len(names) - 1}", int(part.labels.max()))
    order = random.permutation(len(train))
    count = int(validation * len(train))
    apart, kept = np.sort(order[:count]), np.sort(order[count:])
    chosen, watched = (LabelledImages(train.images[rows], train.labels[rows]) for rows in (kept, apart))
    pixels = chosen.images
    # Sums in float64 over the counts of each value: exact, and without a copy of all pixels.
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    values = np.arange(256)
    mean = float((counts * values).sum() / counts.sum())
    std = float(((counts * (values - mean) ** 2).sum() / counts.sum()) ** 0.5)
    if std == 0:
        raise DataError("all pixels are alike", name, "images", mean)
    return ImageData(name, names, chosen, watched, test, mean, std)


def _digits(random: np.random.Generator) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    order = random.permutation(len(labels))
    test, train = np.sort(order[: len(order) // 5]), np.sort(order[len(order) // 5 :])
    parts = (LabelledImages(images[rows], labels[rows]) for rows in (train, test))
    return *parts, tuple(str(digit) for digit in range(10))


def _hint(name: str) -> str:
    hint = f"a folder with {name}/*.npz" + ("" if name == "cifar10" else f" or {name}/{_IDX['train'][0]}.gz")
    return f"{hint}; or --dataset digits, which needs none"


def _hub(name: str) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    if name not in FOLDERS:
        return hub_images(name)
    try:
        return hub_images(name)
    except DataError as error:
        what = f"{name} is not part of this package, and the hub does not give it"
        raise DataError(what, "--data_dir", _hint(name), str(error)) from error


def _folder(name: str, data_dir: str | Path) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    hint = _hint(name)
    names = _NAMES.get(name, tuple(str(digit) for digit in range(10)))
    for folder in (Path(data_dir) / name, Path(data_dir)):
        files = [[present(folder, stem) for stem in _IDX[part]] for part in ("train", "test")]
        if all(path is not None for pair in files for path in pair):
            train, test = (pair(read_idx(images, 3), read_idx(labels, 1), images) for images, labels in files)
            return train, test, names
        for path in sorted(folder.glob(f"{name}*.npz")):
            found = read_npz(path)
            if found is not None:
                return found[0], found[1], found[2] or names
    raise DataError(f"no {name} here", data_dir, hint)
