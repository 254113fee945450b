"""Characters of the fonts that come with matplotlib: letters are the characters, faces of fonts the drawings.

Nothing is downloaded. Letters that look alike are one character, whatever their names and scripts.
"""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

from graphmoe.data.few_shot import Characters
from graphmoe.errors import DataError

SIDE, FILL = 28, 22
"""Height and width of a drawing, and what the longer side of a glyph fills of it, pixels."""

FAMILIES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
}
"""Fonts, and the faces of each."""

SCRIPTS = ("Latin", "Greek", "Cyrillic", "Armenian", "Georgian")
"""Of letters that look alike the one of the earlier script stays."""

ALIKE = 0.86
"""Two letters are one if their ink has more than this correlation in any face."""


@cache
def load_glyphs() -> Characters:
    """Draw all plain letters that every face has, each 28 x 28.

    A letter with a mark that Unicode takes apart, such as an accent, is none. Every glyph is scaled so that
    its longer side fills the same part of the drawing, and centred; a capital letter that is a larger small
    one is therefore the same character.

    Raises:
        DataError: matplotlib has no such fonts, or Pillow cannot draw them.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [folder / f"{family}{face}.ttf" for family, faces in FAMILIES.items() for face in faces]
    try:
        known = set.intersection(*(set(FT2Font(str(file)).get_charmap()) for file in files))
        letters = [(SCRIPTS.index(script), code) for code in known if (script := _script(code))]
        letters.sort()
        images = np.stack([_draw(file, [chr(code) for _, code in letters]) for file in files], axis=1)
    except (OSError, RuntimeError) as error:
        raise DataError(f"fonts cannot be drawn: {error}", folder, "the fonts of matplotlib") from error
    chosen = _different(images)
    alphabet = np.array([script for script, _ in letters])[chosen]
    return Characters(images[chosen], alphabet, SCRIPTS, "glyphs")


def _script(code: int) -> str | None:
    """Script of a plain letter."""
    letter = chr(code)
    if unicodedata.category(letter) not in ("Lu", "Ll", "Lo") or unicodedata.decomposition(letter):
        return None
    script = unicodedata.name(letter, "").split(" ")[0].capitalize()
    return script if script in SCRIPTS else None


def _draw(file: Path, letters: list[str]) -> np.ndarray:
    """Letters in one face, ``[letters, SIDE, SIDE]`` uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(file), 64)
    drawings = np.zeros((len(letters), SIDE, SIDE), dtype=np.uint8)
    for drawing, letter in zip(drawings, letters, strict=True):
        left, top, right, bottom = font.getbbox(letter)
        width, height = max(1, right - left), max(1, bottom - top)
        large = Image.new("L", (width, height))
        ImageDraw.Draw(large).text((-left, -top), letter, font=font, fill=255)
        scale = FILL / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = np.asarray(large.resize(size, Image.Resampling.BOX))
        row, column = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
        drawing[row : row + size[1], column : column + size[0]] = small
    return drawings


def _different(images: np.ndarray) -> np.ndarray:
    """Letters that look like no earlier one, of ``images [letters, faces, SIDE, SIDE]``."""
    ink = (
        images.reshape(*images.shape[:2], -1).transpose(1, 0, 2).astype(np.float32)
    )  # [faces, letters, pixels]
    ink -= ink.mean(axis=2, keepdims=True)
    ink /= np.maximum(np.linalg.norm(ink, axis=2, keepdims=True), 1e-6)
    alike = np.zeros((len(images), len(images)), dtype=bool)
    for face in ink:
        alike |= face @ face.T > ALIKE
    kept: list[int] = []
    for letter in range(len(images)):
        if not alike[letter, kept].any():
            kept.append(letter)
    return np.array(kept)
