"""What of a corpus is held out: whole documents, or the end of a single one."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from graphmoe.errors import DataError


class Facts(NamedTuple):
    """What has to be known of a document before it can be decided whether it is held out.

    Attributes:
        key: Seeded hash of the text.
        num_bytes: Its UTF-8 bytes.
        characters: Its characters.
        blank: Whether it is white space only.
    """

    key: bytes
    num_bytes: int
    characters: int
    blank: bool


def survey(chunks: Iterable[str], seed: int) -> Facts:
    """Read a document, which may come in chunks, once."""
    digest = hashlib.sha256(b"%d\n" % seed)
    num_bytes, characters, blank = 0, 0, True
    for chunk in chunks:
        data = chunk.encode()
        digest.update(data)
        num_bytes += len(data)
        characters += len(chunk)
        blank = blank and not chunk.strip()
    return Facts(digest.digest(), num_bytes, characters, blank)


def split_documents(
    documents: list[str], held_out: float, seed: int, name: str
) -> tuple[list[str], list[str]]:
    """Hold out about a share ``held_out`` of the bytes, in whole documents.

    Documents are considered in the order of a seeded hash of their text and held out while they fit in
    the share; if none does, the smallest is. Equal texts always lie on the same side.

    Raises:
        DataError: If there are not two different documents.
    """
    flags = hold_out([survey([document], seed) for document in documents], held_out, name)
    parts = [], []
    for document, flag in zip(documents, flags, strict=True):
        parts[flag].append(document)
    return parts


def hold_out(facts: Sequence[Facts], held_out: float, name: str) -> list[bool]:
    """Which documents :func:`split_documents` holds out.

    Raises:
        DataError: If there are not two different documents.
    """
    sizes = {}
    for fact in facts:
        sizes[fact.key] = sizes.get(fact.key, 0) + fact.num_bytes
    if len(sizes) < 2:
        raise DataError(
            "nothing to hold out", name, "two different documents", f"{len(sizes)} different in {len(facts)}"
        )
    room = held_out * sum(sizes.values())
    chosen = set()
    for key in sorted(sizes):
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
    chosen = chosen or {min(sorted(sizes), key=sizes.get)}
    return [fact.key in chosen for fact in facts]


def split_text(text: str, held_out: float, name: str) -> tuple[str, str]:
    """Hold out the last share of a text, from the beginning of a line, or of a word in a very long line.

    Raises:
        DataError: If one of the two parts is blank.
    """
    cut = cut_position([text], len(text), held_out)
    train, rest = text[:cut], text[cut:]
    if not train.strip() or not rest.strip():
        raise too_small(name, len(text))
    return train, rest


def cut_position(chunks: Iterable[str], characters: int, held_out: float) -> int:
    """Where :func:`split_text` cuts a text of so many characters, which may come in chunks."""
    target = round(characters * (1 - held_out))
    line = word = seen = 0
    for chunk in chunks:
        if seen >= target:
            break
        start, stop = max(0, target // 2 - seen), target - seen
        last_line, last_word = (chunk.rfind(border, start, stop) + 1 for border in "\n ")
        line, word = (seen + last_line if last_line else line), (seen + last_word if last_word else word)
        seen += len(chunk)
    return line or word or target


def too_small(name: str, characters: int) -> DataError:
    """The error of a text that cannot be cut in two."""
    return DataError("too small to hold anything out", name, "text on both sides", f"{characters} characters")
