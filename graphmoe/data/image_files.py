"""Files of labelled images: the IDX files of MNIST, and arrays of NumPy."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from graphmoe.errors import DataError

_LARGEST = 1 << 30


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """One part of a data set.

    Attributes:
        images: ``[n, C, H, W]`` uint8.
        labels: Class of each, ``[n]`` int64.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None, flag: str) -> "LabelledImages":
        """The first ``count``, or all without a count.

        Raises:
            DataError: Fewer than one, or more than there are; ``flag`` says who asked.
        """
        if count is None:
            return self
        if not 1 <= count <= len(self):
            raise DataError("no number of images", flag, f"from 1 to {len(self)}", count)
        return LabelledImages(self.images[:count], self.labels[:count])


def present(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an array of bytes in the IDX format of MNIST, zipped or not.

    Raises:
        DataError: A file that is damaged, too large, or of something else.
    """
    limit = _LARGEST
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"file cannot be read: {error}", path, "an IDX file") from error
    if len(data) > limit:
        raise DataError("file is too large", path, f"at most {limit} bytes")
    header = 4 * (1 + ndim)
    if len(data) < header or data[:4] != bytes([0, 0, 8, ndim]):
        raise DataError("not an IDX file of bytes", path, f"{ndim} dimensions", data[:4].hex())
    shape = struct.unpack(f">{ndim}I", data[4:header])
    size = int(np.prod(shape, dtype=object))
    if size != len(data) - header:
        raise DataError("file is cut off or too long", path, f"{size} bytes", len(data) - header)
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_npz(path: Path) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]] | None:
    """Both parts of a ``.npz``, and names of classes if it has any; ``None`` for one of something else."""
    if path.stat().st_size > _LARGEST:
        raise DataError("file is too large", path, f"at most {_LARGEST} bytes")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "x_train" not in file.files:
                return None
            if sum(member.file_size for member in file.zip.infolist()) > 4 * _LARGEST:
                raise DataError("arrays are too large", path, f"at most {4 * _LARGEST} bytes")
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
            names = tuple(str(word) for word in file["label_names"]) if "label_names" in file.files else ()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, MemoryError, zlib.error) as error:
        raise DataError(f"file cannot be read: {error}", path, "x_train, y_train, x_test, y_test") from error
    return pair(*arrays[:2], path), pair(*arrays[2:], path), names


def pair(images: np.ndarray, labels: np.ndarray, path: Path) -> LabelledImages:
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and labels.shape == images.shape[:1]
    if not fits or labels.dtype.kind not in "ui":
        expected = "images [n, H, W] or [n, H, W, C] uint8, and as many integer labels"
        raise DataError("arrays of another shape", path, expected, (images.shape, labels.shape))
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return LabelledImages(np.ascontiguousarray(images), labels.astype(np.int64))
