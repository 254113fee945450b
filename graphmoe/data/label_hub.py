"""Labelled rows of Hugging Face data sets; needs the extra ``data``."""

from collections.abc import Iterator

from graphmoe.data.hub import HubText, open_hub
from graphmoe.data.label_files import LabelledRow
from graphmoe.data.tokenizer import first_line
from graphmoe.errors import DataError

_KINDS = ("int64", "int32", "int8", "bool", "string", "large_string")


def hub_rows(
    name: str, *, text_column: str | None = None, label_column: str | None = None
) -> tuple[tuple[str, ...] | None, dict[str, list[LabelledRow]]]:
    """Rows of the splits ``train``, ``validation`` and ``test`` that are there.

    A test split without labels, whose labels are all -1, is none. Where only one of ``validation`` and
    ``test`` is published, it is what results are reported on.

    Args:
        name: ``"owner/name"``, ``"owner/name:config"`` or ``"name:config"``.
        text_column: The column of text; by default ``text``, or the only column of strings.
        label_column: The column of labels; by default ``label``, or the only column of whole numbers.

    Returns:
        The classes in their order, if the data set names them, and the rows of each part.

    Raises:
        DataError: As :func:`~graphmoe.data.hub.open_hub`, if there is no column of labels, or a row lacks a
            text or a label.
    """
    text = open_hub(name, text_column=text_column)
    features = text.splits[text.train].features or {}
    column = _label_column(features, name, text.column, label_column)
    names = getattr(features.get(column), "names", None)
    parts = {}
    for part in ("train", "validation", "test"):
        if part in text.splits:
            rows = list(_rows(text, part, column, names))
            if part == "train" or any(row is not None for row in rows):
                parts[part] = rows
    for part, rows in parts.items():
        if None in rows:
            raise DataError(
                "a row has no label", f"{name}, split {part}", "a class", f"row {rows.index(None)}"
            )
        if not rows:
            raise text.empty(part)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return (None if names is None else tuple(names)), parts


def _label_column(features: dict, name: str, text_column: str, wanted: str | None) -> str:
    kinds = {key: getattr(value, "dtype", "") for key, value in features.items() if key != text_column}
    numbers = [key for key, kind in kinds.items() if str(kind) in _KINDS[:4]]
    column = wanted or ("label" if "label" in kinds else numbers[0] if len(numbers) == 1 else None)
    if column is None or str(kinds.get(column)) not in _KINDS:
        what = "no telling which column holds the labels"
        raise DataError(what, name, wanted or "label, or one column of whole numbers", sorted(kinds))
    return column


def _rows(text: HubText, part: str, column: str, names: list[str] | None) -> Iterator[LabelledRow | None]:
    """The rows of a part; ``None`` for one without a label."""
    where = f"{text.name}, split {part}"
    split = text.splits[part]
    try:
        pairs = list(zip(split[text.column], split[column], strict=True))
    except Exception as error:  # the network and the readers of files share no base class
        raise DataError(f"cannot be read, split {part}", text.name, got=first_line(error)) from error
    for number, (content, label) in enumerate(pairs):
        if not isinstance(content, str) or not content.strip():
            raise DataError("a text is blank", f"{where}, row {number}", "text")
        if label is None or label in (-1, ""):
            yield None
            continue
        if names is not None and not (isinstance(label, int) and 0 <= label < len(names)):
            raise DataError("unknown label", f"{where}, row {number}", f"0 to {len(names) - 1}", label)
        called = str(label) if names is None else names[label]
        yield LabelledRow(content.strip(), called, content.strip(), where)
