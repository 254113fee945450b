"""Documents: texts of the running Python's library or of local files."""

import codecs
import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from graphmoe.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
CHUNK = 1 << 20  # bytes of a file read at a time

# Installed packages, tests and their data, bundled applications and wheels, and files that describe the
# machine on which this Python was built.
NOT_STDLIB = (
    *("site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "ensurepip"),
    *("config-*", "_sysconfigdata*"),
)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.+-]+)?|\w[\w.-]*:[\w.+-]+", re.ASCII)


class NotText(DataError):
    """A file that is not UTF-8 text."""


def stdlib_documents() -> list[str]:
    """Source and documentation of the running Python's standard library, in the order of their paths.

    Raises:
        DataError: If this Python comes without the source of its library.
    """
    documents = [text for text in map(_decode, stdlib_paths()) if text is not None and text.strip()]
    if not documents:
        raise no_stdlib()
    return documents


def stdlib_paths() -> Iterator[Path]:
    """The files that :func:`stdlib_documents` reads."""
    root = Path(sysconfig.get_path("stdlib"))
    return (path for path in _walk(root, NOT_STDLIB) if path.suffix in TEXT_SUFFIXES)


def no_stdlib() -> DataError:
    """The error where there is none of them."""
    root = sysconfig.get_path("stdlib")
    return DataError("this Python comes without the source of its library", root, "a folder of .py files")


def folder_documents(root: Path) -> list[str]:
    """Every text file in a folder and the folders below, in the order of their paths.

    Hidden and blank files are left out. A file with a suffix of text must be UTF-8; of the others, those
    that are not are left out as binary, with a warning that counts them.

    Raises:
        DataError: If a file cannot be read, or no text is found.
    """
    documents, binary = [], []
    for path in folder_paths(root):
        text = read_text(path) if is_text(path) else _decode(path)
        if text is None:
            binary.append(path)
        elif text.strip():
            documents.append(text)
    warn_of_binary(root, binary)
    if not documents:
        raise no_text(root)
    return documents


def folder_paths(root: Path) -> Iterator[Path]:
    """The files that :func:`folder_documents` looks at."""
    return _walk(root, (".*",))


def is_text(path: Path) -> bool:
    """Whether a file says by its name that it is text."""
    return path.suffix.lower() in TEXT_SUFFIXES


def warn_of_binary(root: Path, binary: Sequence[Path]) -> None:
    """Say how many files were left out as binary."""
    if binary:
        logger.warning("%s: left out %d binary files, such as %s", root, len(binary), binary[0].name)


def no_text(root: Path) -> DataError:
    """The error of a folder without a document."""
    return DataError("no text in this folder", root, "files of UTF-8 text, or .npy shards of token ids")


def read_text(path: Path) -> str:
    """The text of a file, byte for byte.

    Raises:
        DataError: If the file cannot be read or is not UTF-8 text.
    """
    return "".join(file_chunks(path))


def _decode(path: Path) -> str | None:
    """The text of a file, or ``None`` if it is binary."""
    try:
        return read_text(path)
    except NotText:
        return None


def file_chunks(path: Path) -> Iterator[str]:
    """The text of a file, byte for byte, about a megabyte at a time.

    Raises:
        DataError: If the file cannot be read; :class:`NotText` if it is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                if b"\0" in data:
                    raise NotText("not a text file", path, "UTF-8 without NUL bytes")
                yield decoder.decode(data)
        decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError("cannot be read", path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise NotText("not a text file", path, "UTF-8 without NUL bytes") from error


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


def local_path(dataset: str, data_dir: str | os.PathLike | None) -> Path | None:
    """The file or folder that a data set's name stands for, or ``None`` if it is not a local one.

    Raises:
        DataError: If there is no such file or folder, and it cannot be anything else.
    """
    if not dataset:
        raise DataError("no corpus named", "dataset", "stdlib, a file, a folder or a datasets name", dataset)
    if dataset == "stdlib":
        if data_dir is not None:
            raise DataError(
                "stdlib does not lie in a folder",
                "data_dir",
                'no data_dir, or a dataset in it such as "."',
                str(data_dir),
            )
        return None
    path = Path(os.path.expanduser(Path(data_dir or "", dataset)))
    if os.path.isfile(path) or os.path.isdir(path):  # Path's own methods raise on a long name
        return path
    if data_dir is None and is_hub_name(dataset):
        return None
    raise DataError(
        "no such file or folder", path, "stdlib, a file, a folder, or a datasets name (owner/name)"
    )
