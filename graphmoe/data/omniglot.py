"""Omniglot: 964 characters of 30 alphabets, each drawn by 20 people, as drawings of 28 x 28."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from graphmoe.data.few_shot import Characters
from graphmoe.errors import DataError

ARRAYS, FOLDER = "omniglot_background_28.npz", "images_background"
SIDE, DRAWINGS = 28, 20
_LARGEST = 1 << 30
_HINT = f"a folder with {ARRAYS} or {FOLDER}/ALPHABET/CHARACTER/*.png; or --dataset glyphs"


def load_omniglot(data_dir: str | Path | None) -> Characters:
    """Read the background set of Omniglot (`Lake et al. 2015 <https://doi.org/10.1126/science.aab3050>`_).

    Args:
        data_dir: Folder that holds, itself or in ``omniglot``, either ``omniglot_background_28.npz`` with the
            arrays ``image [n, 28, 28]`` (uint8, paper 255), ``alphabet [n]`` and ``alphabet_names``, the 20
            drawings of a character in order; or ``images_background`` as it is published, whose images are
            scaled down here.

    Raises:
        DataError: Neither is there, or what is there is something else.
    """
    if data_dir is None:
        raise DataError("Omniglot is not part of this package", "--data_dir", _HINT)
    for folder in (Path(data_dir), Path(data_dir) / "omniglot"):
        if (folder / ARRAYS).is_file():
            return _read_arrays(folder / ARRAYS)
        if (folder / FOLDER).is_dir():
            return _read_images(folder / FOLDER)
    raise DataError("no Omniglot here", data_dir, _HINT)


def _read_arrays(path: Path) -> Characters:
    expected = f"image [n * {DRAWINGS}, {SIDE}, {SIDE}] uint8, alphabet [n * {DRAWINGS}], alphabet_names"
    if path.stat().st_size > _LARGEST:
        raise DataError("file is too large", path, f"at most {_LARGEST} bytes")
    try:
        with np.load(path, allow_pickle=False) as file:
            image, alphabet, names = (file[key] for key in ("image", "alphabet", "alphabet_names"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, MemoryError) as error:
        raise DataError(f"file cannot be read: {error}", path, expected) from error
    fits = image.dtype == np.uint8 and image.ndim == 3 and image.shape[1:] == (SIDE, SIDE) and len(image)
    if not fits or len(image) % DRAWINGS or alphabet.shape != image.shape[:1]:
        raise DataError("arrays of another shape", path, expected, (image.shape, alphabet.shape))
    alphabet = alphabet.reshape(-1, DRAWINGS).astype(np.int64)
    if (alphabet != alphabet[:, :1]).any() or alphabet.min() < 0 or alphabet.max() >= len(names):
        raise DataError("drawings of a character are not in order", path, expected)
    images = 255 - image.reshape(-1, DRAWINGS, SIDE, SIDE)
    return Characters(images, alphabet[:, 0], tuple(str(name) for name in names), "omniglot")


def _read_images(folder: Path) -> Characters:
    from PIL import Image

    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images, alphabet = [], []
    for number, name in enumerate(names):
        for character in sorted(path for path in (folder / name).iterdir() if path.is_dir()):
            files = sorted(character.glob("*.png"))
            if len(files) != DRAWINGS:
                raise DataError("not all drawings of a character", character, DRAWINGS, len(files))
            try:
                drawings = [
                    np.asarray(Image.open(file).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
                    for file in files
                ]
            except (OSError, ValueError) as error:
                raise DataError(f"an image cannot be read: {error}", character) from error
            images.append(255 - np.stack(drawings))
            alphabet.append(number)
    if not images:
        raise DataError("no character here", folder, "ALPHABET/CHARACTER/*.png")
    return Characters(np.stack(images), np.array(alphabet), tuple(names), "omniglot")
