import numpy as np
import pytest

from graphmoe.data import glyphs
from graphmoe.data.few_shot import Episodes, pixel_neighbours
from graphmoe.errors import DataError


@pytest.fixture(scope="module")
def letters():
    return glyphs.load_glyphs()


def test_letters_are_drawings_of_every_face(letters):
    faces = sum(len(faces) for faces in glyphs.FAMILIES.values())
    assert letters.images.shape[1:] == (faces, glyphs.SIDE, glyphs.SIDE) and letters.images.dtype == np.uint8
    assert set(letters.alphabet) == set(range(len(glyphs.SCRIPTS))) and len(letters) > 200
    assert letters.images.reshape(len(letters), faces, -1).max(axis=2).min() > 128  # no face lacks a letter
    rows = letters.images.max(axis=3) > 32  # [letters, faces, SIDE]
    columns = letters.images.max(axis=2) > 32
    longest = np.maximum(rows.sum(axis=2), columns.sum(axis=2))
    assert np.median(longest) >= glyphs.FILL - 1 and longest.max() <= glyphs.FILL + 1


def test_no_two_letters_look_alike(letters):
    for face in range(letters.drawings):
        alike = np.corrcoef(letters.images[:, face].reshape(len(letters), -1).astype(np.float64))
        np.fill_diagonal(alike, 0)
        assert alike.max() <= glyphs.ALIKE + 1e-6


def test_faces_of_a_letter_are_nearer_than_chance(letters):
    right = pixel_neighbours(Episodes(letters, 5, 1, 5), range(50))
    assert 0.5 < right.mean() < 1  # alike, but not the same


def test_the_same_every_time(letters):
    glyphs.load_glyphs.cache_clear()
    assert glyphs.load_glyphs().fingerprint == letters.fingerprint


def test_without_the_fonts(monkeypatch, tmp_path):
    import matplotlib

    glyphs.load_glyphs.cache_clear()
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="fonts cannot be drawn"):
        glyphs.load_glyphs()
