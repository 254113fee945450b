import numpy as np
import pytest

from graphmoe.data.omniglot import ARRAYS, DRAWINGS, load_omniglot
from graphmoe.errors import DataError


def write(path, **changes):
    image = np.full((3 * DRAWINGS, 28, 28), 255, dtype=np.uint8)
    image[DRAWINGS:, 3, 4] = 0
    alphabet = np.repeat([0, 0, 1], DRAWINGS)
    arrays = {"image": image, "alphabet": alphabet, "alphabet_names": np.array(["A", "B"])} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize("place", [".", "omniglot"])
def test_arrays(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    write(tmp_path / place / ARRAYS)
    data = load_omniglot(tmp_path)
    assert data.images.shape == (3, DRAWINGS, 28, 28) and data.alphabet.tolist() == [0, 0, 1]
    assert data.alphabet_names == ("A", "B") and data.name == "omniglot"
    assert data.images[0].max() == 0 and data.images[1, :, 3, 4].min() == 255  # ink is 255


def test_published_images(tmp_path):
    from PIL import Image

    for alphabet, character, mark in (("Greek", "character01", 10), ("Latin", "character01", 80)):
        folder = tmp_path / "images_background" / alphabet / character
        folder.mkdir(parents=True)
        page = np.full((105, 105), 255, dtype=np.uint8)
        page[mark : mark + 8] = 0
        for drawer in range(DRAWINGS):
            Image.fromarray(page).convert("1").save(folder / f"0001_{drawer + 1:02d}.png")
    data = load_omniglot(tmp_path)
    assert data.images.shape == (2, DRAWINGS, 28, 28) and data.alphabet_names == ("Greek", "Latin")
    assert data.images[0, 0].mean(axis=1).argmax() == 3 and data.images[1, 0].mean(axis=1).argmax() == 22
    (folder / "0001_01.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="an image cannot be read"):
        load_omniglot(tmp_path)
    (folder / "0001_01.png").unlink()
    with pytest.raises(DataError, match="not all drawings of a character; expected 20; got 19"):
        load_omniglot(tmp_path)


def test_not_there(tmp_path):
    for place in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="or --dataset glyphs"):
            load_omniglot(place)


BAD = {
    "no key": {"alphabet": None},
    "another type": {"image": np.zeros((60, 28, 28), dtype=np.float32)},
    "another size": {"image": np.zeros((60, 105, 105), dtype=np.uint8)},
    "a drawing missing": {
        "image": np.zeros((59, 28, 28), dtype=np.uint8),
        "alphabet": np.zeros(59, dtype=int),
    },
    "no drawing": {"image": np.zeros((0, 28, 28), dtype=np.uint8), "alphabet": np.zeros(0, dtype=int)},
    "out of order": {"alphabet": np.arange(60) % 2},
    "an unknown alphabet": {"alphabet": np.repeat([0, 1, 2], DRAWINGS)},
    "objects": {"alphabet_names": np.array([{}, "B"], dtype=object)},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_malformed_arrays(tmp_path, changes):
    write(tmp_path / ARRAYS, **changes)
    with pytest.raises(DataError, match=ARRAYS):
        load_omniglot(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_damaged_file(tmp_path, content):
    (tmp_path / ARRAYS).write_bytes(content)
    with pytest.raises(DataError, match=ARRAYS):
        load_omniglot(tmp_path)


def test_real_data(data_dir):
    if not (data_dir / "omniglot" / ARRAYS).is_file():
        pytest.skip("no Omniglot")
    data = load_omniglot(data_dir)
    assert data.images.shape == (964, DRAWINGS, 28, 28) and len(data.alphabet_names) == 30
    assert 0.02 < (data.images > 0).mean() < 0.3
