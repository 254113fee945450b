"""Documents: texts read from the running Python, local files or the Hugging Face hub, and their split."""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from graphmoe.data.tokenizer import first_line
from graphmoe.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
HEAD = 1 << 13  # bytes looked at before the whole of an unknown, possibly huge file is read

# Installed packages, tests and their data, bundled applications and wheels, and files that describe the
# machine on which this Python was built.
NOT_STDLIB = (
    *("site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "ensurepip"),
    *("config-*", "_sysconfigdata*"),
)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.+-]+)?|\w[\w.-]*:[\w.+-]+", re.ASCII)


def stdlib_documents() -> list[str]:
    """Source and documentation of the running Python's standard library, in the order of their paths.

    Raises:
        DataError: If this Python comes without the source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in _walk(root, NOT_STDLIB) if path.suffix in TEXT_SUFFIXES)
    documents = [text for text in map(_decode, paths) if text is not None and text.strip()]
    if not documents:
        raise DataError("this Python comes without the source of its library", root, "a folder of .py files")
    return documents


def folder_documents(root: Path) -> list[str]:
    """Every text file in a folder and the folders below, in the order of their paths.

    Hidden and blank files are left out. A file with a suffix of text must be UTF-8; of the others, those
    that are not are left out as binary, with a warning that counts them.

    Raises:
        DataError: If a file cannot be read, or no text is found.
    """
    documents, binary = [], []
    for path in _walk(root, (".*",)):
        text = read_text(path) if path.suffix.lower() in TEXT_SUFFIXES else _decode(path)
        if text is None:
            binary.append(path)
        elif text.strip():
            documents.append(text)
    if binary:
        logger.warning("%s: left out %d binary files, such as %s", root, len(binary), binary[0].name)
    if not documents:
        raise DataError("no text in this folder", root, "files of UTF-8 text, or .npy shards of token ids")
    return documents


def read_text(path: Path) -> str:
    """The text of a file, byte for byte.

    Raises:
        DataError: If the file cannot be read or is not UTF-8 text.
    """
    text = _decode(path)
    if text is None:
        raise DataError("not a text file", path, "UTF-8 without NUL bytes")
    return text


def _decode(path: Path) -> str | None:
    """The text of a file, or ``None`` if it is binary."""
    try:
        with path.open("rb") as file:
            data = file.read(HEAD)
            if b"\0" in data:
                return None
            data += file.read()
    except OSError as error:
        raise DataError("cannot be read", path, got=error.strerror) from error
    try:
        return None if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _walk(root: Path, excluded: tuple[str, ...]) -> Iterator[Path]:
    """Regular files below ``root`` in the order of their paths, except below names that match."""

    def fail(error: OSError) -> None:
        raise DataError("cannot be read", error.filename, got=error.strerror) from error

    def wanted(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in excluded)

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = filter(wanted, folders)
        paths += [Path(folder, name) for name in filter(wanted, names)]
    return (
        path for path in sorted(paths, key=lambda path: path.relative_to(root).parts) if os.path.isfile(path)
    )


def is_hub_name(name: str) -> bool:
    """Whether a name has the form ``owner/name``, ``owner/name:config`` or ``name:config``."""
    return HUB_NAME.fullmatch(name) is not None and Path(name).suffix not in TEXT_SUFFIXES | {".npy"}


def hub_documents(name: str) -> tuple[list[str], list[str] | None]:
    """Rows of a Hugging Face data set: split ``train``, and ``validation`` or ``test`` where there is one.

    Raises:
        DataError: If ``datasets`` is not installed, the data set cannot be loaded, or it has no
            training split or no column of text.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'no such file or folder, and datasets is not installed (pip install "graphmoe[data]")', name
        ) from error
    path, _, config = name.partition(":")
    # Given the name of one of its readers, datasets would read whatever files lie in the working directory.
    if path.isidentifier() and find_spec(f"datasets.packaged_modules.{path}"):
        raise DataError("the name of a file format, not of a data set", name, "owner/name or name:config")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub client, the file readers and the network share no base class
        raise DataError(
            "no such file or folder, and not reachable as a datasets name", name, got=first_line(error)
        ) from error
    if "train" not in splits:
        raise DataError("the data set has no training split", name, "a split named train", sorted(splits))
    column = _text_column(splits["train"].features, name)
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    train, rest = (
        None if split is None else [text for text in splits[split][column] if text and text.strip()]
        for split in ("train", held_out)
    )
    if not train or rest == []:
        raise DataError(
            "the data set has no text in a split", name, "rows of text", "train" if rest else held_out
        )
    return train, rest


def _text_column(features: dict, name: str) -> str:
    """``text``, or the only column of strings."""
    columns = [
        key for key, value in features.items() if getattr(value, "dtype", "") in ("string", "large_string")
    ]
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise DataError(
            "no telling which column is the text", name, "text, or one column of strings", columns
        )
    return columns[0]


def split_documents(
    documents: list[str], held_out: float, seed: int, name: str
) -> tuple[list[str], list[str]]:
    """Hold out about a share ``held_out`` of the bytes, in whole documents.

    Documents are considered in the order of a seeded hash of their text and held out while they fit in
    the share; if none does, the smallest is. Equal texts always lie on the same side.

    Raises:
        DataError: If there are not two different documents.
    """
    keys, sizes = [], {}
    for document in documents:
        data = document.encode()
        key = hashlib.sha256(b"%d\n" % seed + data).digest()
        keys.append(key)
        sizes[key] = sizes.get(key, 0) + len(data)
    if len(sizes) < 2:
        raise DataError(
            "nothing to hold out", name, "two different documents", f"{len(sizes)} different in {len(keys)}"
        )
    room = held_out * sum(sizes.values())
    chosen = set()
    for key in sorted(sizes):
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
    chosen = chosen or {min(sorted(sizes), key=sizes.get)}
    parts = [], []
    for document, key in zip(documents, keys, strict=True):
        parts[key in chosen].append(document)
    return parts


def split_text(text: str, held_out: float, name: str) -> tuple[str, str]:
    """Hold out the last share of a text, from the beginning of a line, or of a word in a very long line.

    Raises:
        DataError: If one of the two parts is blank.
    """
    target = round(len(text) * (1 - held_out))
    lines, words = (text.rfind(border, target // 2, target) + 1 for border in "\n ")
    cut = lines or words or target
    train, rest = text[:cut], text[cut:]
    if not train.strip() or not rest.strip():
        raise DataError(
            "too small to hold anything out", name, "text on both sides", f"{len(text)} characters"
        )
    return train, rest
