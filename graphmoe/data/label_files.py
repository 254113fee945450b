"""Files of labelled texts: read whole, and refused where they are cut short or malformed."""

import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from graphmoe.data.documents import read_text
from graphmoe.errors import DataError


class LabelledRow(NamedTuple):
    """A text and its class.

    Attributes:
        text: Not blank.
        label: Name of the class.
        group: What texts that belong together, such as those of one file, have in common.
        file: Where it was read, for messages.
    """

    text: str
    label: str
    group: str
    file: str


class Published(NamedTuple):
    """A data set in the form in which it was published.

    Attributes:
        classes: What each label is called, in the order of the classes.
        read: Reader of its files.
        rows: For each part the file, and how many rows it has as published.
    """

    classes: dict[str, str]
    read: Callable[[Path, dict[str, str]], list[LabelledRow]]
    rows: dict[str, tuple[str, int]]


def published_rows(
    name: str, data_dir: str | os.PathLike | None
) -> tuple[tuple[str, ...], dict[str, list[LabelledRow]]]:
    """Rows of a data set of :data:`PUBLISHED`, from the folder of its name in ``data_dir`` or ``data_dir``.

    A test file without a training file is divided like one.

    Raises:
        DataError: If no file is there, or one is malformed or has other than the published number of rows.
    """
    known = PUBLISHED[name]
    names = " or ".join(f"{name}/{file}" for file, _ in known.rows.values())
    if data_dir is None:
        raise DataError(f"{name} is not downloaded for you", "data_dir", f"a folder with {names}")
    folder = Path(os.path.expanduser(data_dir))
    folder = folder / name if os.path.isdir(folder / name) else folder
    parts = {}
    for part, (file, count) in known.rows.items():
        if os.path.isfile(folder / file):
            parts[part] = known.read(folder / file, known.classes)
            if len(parts[part]) != count:
                what = "the file is cut short, or another one"
                raise DataError(what, folder / file, f"{count:,} rows", len(parts[part]))
    if not parts:
        raise DataError(f"no file of {name} here", folder, f"{names}, as published")
    if "train" not in parts:
        parts["train"] = parts.pop("test")
    return tuple(known.classes.values()), parts


def file_rows(path: Path) -> list[LabelledRow]:
    """Rows of a file of one's own: ``.tsv`` with ``text<TAB>label``, or ``.csv`` with a line of column names,
    ``text`` and ``label`` among them.

    Raises:
        DataError: If it is neither, or malformed.
    """
    if path.suffix.lower() == ".tsv":
        return tsv_rows(path, None)
    if path.suffix.lower() != ".csv":
        raise DataError(
            "no telling how texts and labels stand in it", path, "a .tsv or .csv file", path.suffix
        )
    lines = csv_lines(path)
    _, names = next(lines, (0, []))
    if not {"text", "label"} <= set(names):
        raise DataError("no columns of texts and labels", f"{path}, line 1", "text and label", names)
    text, label = names.index("text"), names.index("label")
    rows = []
    for number, line in lines:
        if len(line) != len(names):
            raise _malformed(path, number, f"{len(names)} columns", len(line))
        rows.append(_row(line[text], line[label].strip(), path, number, None))
    return _some(rows, path)


def tsv_rows(path: Path, classes: dict[str, str] | None) -> list[LabelledRow]:
    """Rows of lines ``text<TAB>label`` without quoting."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        text, tab, label = line.removesuffix("\r").rpartition("\t")
        if not tab:
            raise _malformed(path, number, "text, a tab and a label", line[:40])
        rows.append(_row(text, label.strip(), path, number, classes))
    return _some(rows, path)


def ag_news_rows(path: Path, classes: dict[str, str]) -> list[LabelledRow]:
    """Rows of ``"class","title","description"``."""
    rows = []
    for number, line in csv_lines(path):
        if len(line) != 3:
            raise _malformed(path, number, "class, title and description", f"{len(line)} columns")
        label, title, description = line
        if not title.strip() or not description.strip():
            raise _malformed(path, number, "a title and a description", line)
        # In these files a backslash stands for the end of a line.
        text = f"{title} {description}".replace("\\", " ")
        rows.append(_row(text, label, path, number, classes))
    return _some(rows, path)


def csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and columns of each line of a comma-separated file; a quote that never ends is an error."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        try:
            line = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _malformed(path, reader.line_num, "comma-separated values", str(error)) from error
        yield reader.line_num, line


def _row(text: str, label: str, path: Path, number: int, classes: dict[str, str] | None) -> LabelledRow:
    text = text.strip()
    if not text:
        raise DataError("a text is blank", f"{path}, line {number}", "text")
    if not label or (classes is not None and label not in classes):
        expected = "a label" if classes is None else f"one of {', '.join(classes)}"
        raise DataError("unknown label", f"{path}, line {number}", expected, label[:40])
    # Equal texts were made one, so that a text is a group of its own.
    return LabelledRow(text, label if classes is None else classes[label], text, str(path))


def _some(rows: list[LabelledRow], path: Path) -> list[LabelledRow]:
    if not rows:
        raise DataError("no labelled text", path, "a row for each text")
    return rows


def _malformed(path: Path, number: int, expected: str, got: object) -> DataError:
    return DataError("the file is malformed or cut short", f"{path}, line {number}", expected, got)


PUBLISHED = {
    "ag_news": Published(
        {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"},
        ag_news_rows,
        {"train": ("train.csv", 120_000), "test": ("test.csv", 7_600)},
    ),
    "sst2": Published({"0": "negative", "1": "positive"}, tsv_rows, {"train": ("train.tsv", 6_920)}),
}
"""Data sets that are known by name."""
