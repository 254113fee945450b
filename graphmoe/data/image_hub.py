"""Labelled images of Hugging Face data sets; needs the extra ``data``."""

from typing import Any

import numpy as np

from graphmoe.data.hub import load_splits
from graphmoe.data.image_files import LabelledImages
from graphmoe.data.tokenizer import first_line
from graphmoe.errors import DataError

NAMES = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
}
"""Where the data sets that have a short name are."""


def hub_images(name: str) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    """The splits ``train`` and ``test`` of a data set, and the names of its classes.

    Args:
        name: ``"owner/name"`` or ``"owner/name:config"``, or one of :data:`NAMES`.

    Raises:
        DataError: As :func:`~graphmoe.data.hub.load_splits`; a split is missing, there is not one column of
            images and one of classes, or images differ in size.
    """
    name = NAMES.get(name, name)
    splits = load_splits(name)
    for part in ("train", "test"):
        if part not in splits:
            raise DataError("the data set lacks a split", name, part, sorted(splits))
    features = splits["train"].features
    images = [key for key, kind in features.items() if type(kind).__name__ == "Image"]
    labels = [key for key, kind in features.items() if getattr(kind, "names", None)]
    if len(images) != 1 or len(labels) != 1:
        raise DataError("no telling images from classes", name, "one column of each", sorted(features))
    train, test = (_part(splits[part], name, part, images[0], labels[0]) for part in ("train", "test"))
    return train, test, tuple(features[labels[0]].names)


def _part(rows: Any, name: str, part: str, image: str, label: str) -> LabelledImages:
    where = f"{name}, split {part}"
    try:
        arrays = [np.asarray(picture, dtype=np.uint8) for picture in rows[image]]
        labels = np.asarray(list(rows[label]), dtype=np.int64)
    except Exception as error:  # the network and the readers of files share no base class
        raise DataError("cannot be read", where, got=first_line(error)) from error
    if not arrays:
        raise DataError("no image", where, "at least one")
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError("images of different sizes", where, "one size", sorted(shapes)[:2])
    stacked = np.stack(arrays)
    if stacked.ndim == 3:
        stacked = stacked[..., None]
    return LabelledImages(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)), labels)
