"""Texts with one label each: from a name to training, validation and test parts that share nothing."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from graphmoe.data.docstrings import DOCSTRINGS, docstring_rows
from graphmoe.data.documents import is_hub_name
from graphmoe.data.label_files import PUBLISHED, LabelledRow, file_rows, published_rows
from graphmoe.data.label_hub import hub_rows
from graphmoe.errors import DataError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class LabelledPart:
    """Texts and their classes.

    Attributes:
        texts: ``n`` texts, none of them blank.
        labels: The class of each, ``[n]`` int64.
    """

    texts: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class LabelledText:
    """A data set for text classification.

    Attributes:
        name: What was read, such as ``"docstrings (Python 3.11.7)"``.
        class_names: Name of each class.
        train: What models, tokenizers and vocabularies are made from.
        validation: What settings are chosen on.
        test: What results are reported on, and nothing is chosen on.
        fingerprint: SHA-256 of all texts, labels and class names, in hexadecimal digits.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledPart
    validation: LabelledPart
    test: LabelledPart
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def majority(self) -> float:
        """Test accuracy of always answering the class that is most frequent in training."""
        most = np.bincount(self.train.labels, minlength=self.num_classes).argmax()
        return float((self.test.labels == most).mean())

    def describe(self) -> str:
        """One plain line: texts of each part, and the share of each class."""
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in PARTS)
        counts = np.bincount(self.train.labels, minlength=self.num_classes) / len(self.train)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(self.class_names, counts, strict=True)
        )
        return f"{self.name}: {sizes} texts; classes in training: {shares}"


def load_classification(
    dataset: str | os.PathLike = DOCSTRINGS,
    *,
    data_dir: str | os.PathLike | None = None,
    num_classes: int = 4,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> LabelledText:
    """Load labelled texts and divide them into three parts.

    What ``dataset`` may be, in the order in which it is looked for:

    * ``"docstrings"``: docstrings of the running Python's standard library, no download. The class is the
      top-level package, of the ``num_classes`` packages with the most docstrings; those of one module stay
      together, so that a module is never known from training.
    * ``"ag_news"``: news in four classes, from ``ag_news/train.csv`` and ``ag_news/test.csv`` in
      ``data_dir``, or from one of them.
    * ``"sst2"``: sentences of film reviews, from ``sst2/train.tsv`` in ``data_dir``.
    * A ``.tsv`` file of lines ``text<TAB>label``, or a ``.csv`` file with columns ``text`` and ``label``.
    * A Hugging Face data set, ``"owner/name"``, ``"owner/name:config"`` or ``"name:config"``, with columns of
      text and of labels. Needs the extra ``data``.

    Parts that are published stay as they are; a part that is not is cut from the training rows, with the
    same share of every class, chosen by a seeded hash. Of equal texts one stays, in the part furthest from
    training.

    Args:
        dataset: Where the texts come from, as above.
        data_dir: Folder that a relative ``dataset`` lies in.
        num_classes: Classes of ``"docstrings"``.
        validation: Share of the training rows to choose settings on, if it is not published.
        test: Share of the rows to report on, if it is not published.
        seed: Seed of the division.

    Raises:
        DataError: If the data set is missing (it is never replaced by another one), a file is cut short or
            malformed, a text is blank, there are fewer than two classes, or a class is too small to be in
            all parts.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 0.5:
            raise DataError("not a share", name, "a number above 0 and below 0.5", share)
    name, classes, rows = _read(os.fspath(dataset), data_dir, num_classes)
    rows = _without_duplicates(rows)
    if classes is None:
        classes = tuple(sorted({row.label for part in rows.values() for row in part}))
    found = {row.label for row in rows["train"]}
    if len(found) < 2:
        where = rows["train"][0].file if rows["train"] else name
        raise DataError("nothing to tell apart", where, "rows of at least two classes", sorted(found))
    if "test" not in rows:
        rows["train"], rows["test"] = _cut(rows["train"], test, seed, "test", name)
    if "validation" not in rows:
        rows["train"], rows["validation"] = _cut(rows["train"], validation, seed, "validation", name)
    number = {label: index for index, label in enumerate(classes)}
    parts = {}
    for part in PARTS:
        labels = [number[row.label] for row in rows[part]]
        parts[part] = LabelledPart([row.text for row in rows[part]], np.array(labels, dtype=np.int64))
        missing = sorted(set(found) - {row.label for row in rows[part]})
        if missing:
            raise DataError(f"no {part} text of a class", name, f"some of {missing[0]}", len(labels))
    return LabelledText(name, classes, **parts, fingerprint=_fingerprint(classes, parts.values()))


def _read(
    dataset: str, data_dir: str | os.PathLike | None, num_classes: int
) -> tuple[str, tuple[str, ...] | None, dict[str, list[LabelledRow]]]:
    """Name, classes in their order if they have one, and the rows of the parts that are published."""
    if dataset == DOCSTRINGS:
        if data_dir is not None:
            expected = "no data_dir, or a dataset in it"
            raise DataError("docstrings do not lie in a folder", "data_dir", expected, str(data_dir))
        name, rows = docstring_rows(num_classes)
        return name, None, {"train": rows}
    if dataset in PUBLISHED:
        return dataset, *published_rows(dataset, data_dir)
    path = Path(os.path.expanduser(Path(data_dir or "", dataset)))
    if os.path.isfile(path):
        return str(path), None, {"train": file_rows(path)}
    if data_dir is None and is_hub_name(dataset):
        return dataset, *hub_rows(dataset)
    known = ", ".join((DOCSTRINGS, *PUBLISHED))
    expected = f"{known}, a .tsv or .csv file, or a datasets name (owner/name)"
    raise DataError("no such labelled texts", path if data_dir else dataset, expected)


def _without_duplicates(rows: dict[str, list[LabelledRow]]) -> dict[str, list[LabelledRow]]:
    """The first of equal texts, white space aside; what is in a later part is not in an earlier one."""
    seen: set[str] = set()
    kept = {}
    for part in reversed(PARTS):
        if part in rows:
            kept[part] = []
            for row in rows[part]:
                key = " ".join(row.text.split())
                if key not in seen:
                    kept[part].append(row)
                    seen.add(key)
    return kept


def _cut(
    rows: Sequence[LabelledRow], share: float, seed: int, part: str, name: str
) -> tuple[list[LabelledRow], list[LabelledRow]]:
    """Divide rows in two, the second with about a ``share`` of each class; groups stay together.

    Within a class, groups are considered in the order of a seeded hash and taken while they fit; if none
    fits, the smallest is.
    """
    sizes = Counter((row.label, row.group) for row in rows)
    room = {label: share * count for label, count in Counter(row.label for row in rows).items()}
    taken: set[tuple[str, str]] = set()
    for label, left in sorted(room.items()):
        groups = sorted((group for group in sizes if group[0] == label), key=lambda g: _key(seed, part, g[1]))
        if len(groups) < 2:
            what = f"too few independent texts of class {label} to cut off a {part} part"
            raise DataError(what, name, "at least 3 files (or texts) of each class", len(groups))
        for group in groups:
            if sizes[group] <= left:
                taken.add(group)
                left -= sizes[group]
        if not any(group in taken for group in groups):
            taken.add(min(groups, key=sizes.__getitem__))
    rest, cut = [], []
    for row in rows:
        (cut if (row.label, row.group) in taken else rest).append(row)
    return rest, cut


def _key(seed: int, part: str, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{part}\n{group}".encode()).digest()


def _fingerprint(classes: Iterable[str], parts: Iterable[LabelledPart]) -> str:
    digest = hashlib.sha256()
    for text in classes:
        _add(digest, text)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.labels.astype("<i8").tobytes())
        for text in part.texts:
            _add(digest, text)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", text: str) -> None:
    data = text.encode()
    digest.update(len(data).to_bytes(8, "little") + data)
