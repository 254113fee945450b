"""Rows of text of Hugging Face data sets, loaded or streamed; needs the extra ``data``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any

from graphmoe.data.tokenizer import first_line
from graphmoe.errors import DataError

LOOK = 100  # rows looked at where a stream does not say what its columns hold


@dataclass(frozen=True)
class HubText:
    """The text of a data set.

    Attributes:
        name: Its name, with its config.
        splits: Its splits, as ``datasets`` has them.
        train: Name of the split to train on.
        held_out: Name of the split that is published for evaluation, or ``None``.
        column: The column of text.
    """

    name: str
    splits: Mapping[str, Any]
    train: str
    held_out: str | None
    column: str

    def texts(self, split: str) -> Iterator[str]:
        """The rows of a split in their order, blank ones left out.

        Raises:
            DataError: If a row holds no text, or cannot be read.
        """
        try:
            for text in self.splits[split][self.column]:
                if not isinstance(text, str | None):
                    raise DataError(
                        "not a column of text", self.name, "strings", f"{self.column}: {type(text).__name__}"
                    )
                if text and text.strip():
                    yield text
        except DataError:
            raise
        except Exception as error:  # the network and the readers of files share no base class
            raise DataError(f"cannot be read, split {split}", self.name, got=first_line(error)) from error

    def num_rows(self) -> int | None:
        """Rows of both splits together, where the data set says so."""
        rows = 0
        for split in filter(None, (self.train, self.held_out)):
            known = getattr(getattr(self.splits[split], "info", None), "splits", None) or {}
            count = getattr(known.get(split), "num_examples", None)
            if not count:
                return None
            rows += count
        return rows

    def empty(self, split: str) -> DataError:
        """The error of a split without text."""
        return DataError("the data set has no text in a split", self.name, "rows of text", split)


def open_hub(
    name: str, *, split: str = "train", text_column: str | None = None, streaming: bool = False
) -> HubText:
    """Find a data set on the Hugging Face hub or in the cache.

    Args:
        name: ``"owner/name"``, ``"owner/name:config"`` or ``"name:config"``.
        split: The split to train on. ``validation``, or else ``test``, is held out, where there is one.
        text_column: The column of text; by default ``text``, or the only column of strings.
        streaming: Whether to read rows as they arrive instead of downloading all of them first.

    Raises:
        DataError: As :func:`load_splits`, or if the data set has no such split or column of text.
    """
    splits = load_splits(name, streaming=streaming)
    if split not in splits:
        what = f"the data set has no {'training split' if split == 'train' else f'split {split}'}"
        raise DataError(what, name, f"a split named {split}", sorted(splits))
    held_out = next((other for other in ("validation", "test") if other in splits and other != split), None)
    return HubText(name, splits, split, held_out, _text_column(splits[split], name, text_column))


def load_splits(name: str, *, streaming: bool = False) -> Mapping[str, Any]:
    """The splits of a data set on the Hugging Face hub or in the cache, as ``datasets`` has them.

    Args:
        name: ``"owner/name"``, ``"owner/name:config"`` or ``"name:config"``.
        streaming: Whether to read rows as they arrive instead of downloading all of them first.

    Raises:
        DataError: If ``datasets`` is not installed, or the data set cannot be loaded.
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
        return datasets.load_dataset(path, config or None, **({"streaming": True} if streaming else {}))
    except Exception as error:  # the hub client, the file readers and the network share no base class
        raise DataError(
            "no such file or folder, and not reachable as a datasets name", name, got=first_line(error)
        ) from error


def hub_documents(name: str) -> tuple[list[str], list[str] | None]:
    """Rows of a data set: split ``train``, and ``validation`` or ``test`` where there is one.

    Raises:
        DataError: As :func:`open_hub`, or if a split holds no text.
    """
    text = open_hub(name)
    train = list(text.texts(text.train))
    rest = None if text.held_out is None else list(text.texts(text.held_out))
    if not train or rest == []:
        raise text.empty(text.held_out if train else text.train)
    return train, rest


def _text_column(rows: Any, name: str, wanted: str | None) -> str:
    """``wanted``, or else ``text``, or the only column of strings."""
    if rows.features is None:
        columns = _columns_of_text(rows, name)
    else:
        columns = [
            key
            for key, value in rows.features.items()
            if getattr(value, "dtype", "") in ("string", "large_string")
        ]
    if wanted is not None and wanted not in columns:
        raise DataError("no such column of text", name, f"a column of strings named {wanted}", columns)
    if wanted is not None or "text" in columns:
        return wanted or "text"
    if len(columns) != 1:
        raise DataError(
            "no telling which column is the text", name, "text, or one column of strings", columns
        )
    return columns[0]


def _columns_of_text(rows: Any, name: str) -> list[str]:
    """The columns that hold strings in the first rows of a stream."""
    kinds: dict[str, set[type]] = {}
    try:
        for row in islice(rows, LOOK):
            for key, value in row.items():
                kinds.setdefault(key, set()).add(type(value))
    except Exception as error:  # the network and the readers of files share no base class
        raise DataError("cannot be read", name, got=first_line(error)) from error
    return [key for key, found in kinds.items() if str in found and found <= {str, type(None)}]
