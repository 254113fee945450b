"""Long texts in pieces, cut where the byte-level splitter begins a new word, so that no token changes."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Between words: behind a newline, or before a space, that has no other white space beside it. The
# byte-level splitter always begins a new word there, so cutting changes no token.
BORDER = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")
# Before white space of any length, which is as good: taken where a text, such as one without spaces and
# with blank lines or carriage returns, has none of the others for LONG pieces.
RARE_BORDER = re.compile(r"(?<=\S)(?=[ \n\r])")
LONG = 16


class Piece(NamedTuple):
    """A part of a document, cut between words.

    Attributes:
        text: The part.
        last: Whether the document ends with it.
        held_out: Whether the document is held out.
    """

    text: str
    last: bool
    held_out: bool = False


def cut_document(chunks: Iterable[str], size: int, *, held_out: bool) -> Iterator[Piece]:
    """The pieces of a document that comes in chunks; see :func:`cut_chunks`."""
    ready = None
    for text in cut_chunks(chunks, size):
        if ready is not None:
            yield Piece(ready, False, held_out)
        ready = text
    yield Piece(ready, True, held_out)


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text between words into pieces of at least ``size`` characters, the last one excepted."""
    return cut_chunks([text], size)


def cut_chunks(chunks: Iterable[str], size: int) -> Iterator[str]:
    """:func:`cut` for a text that comes in chunks, however they divide it; at most one is kept waiting.

    Where a text has no border between words for ``LONG`` pieces, it is cut before any white space;
    one without any stays whole.
    """
    text, start, final = "", 0, False
    chunks = iter(chunks)
    while not final:
        chunk = next(chunks, None)
        final = chunk is None
        text, start = text[start:] + (chunk or ""), 0
        while True:
            limit = start + LONG * size
            border = BORDER.search(text, start + size, limit)
            if border is None and len(text) > limit:
                border = RARE_BORDER.search(text, start + size)
            if border is None:
                break
            yield text[start : border.end()]
            start = border.end()
    yield text[start:]
