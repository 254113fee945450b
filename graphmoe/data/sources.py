"""Corpora as streams of documents: read as often as needed, never held in memory as a whole.

What is held out is what :func:`graphmoe.data.load_text` holds out, document by document. Only the rows of
a data set of the Hugging Face hub are treated otherwise, where it has more than ``KEPT`` characters and no
split for evaluation: such a stream should be read once, so that each row is decided on by itself.
"""

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from graphmoe.data.documents import (
    NotText,
    file_chunks,
    folder_paths,
    is_text,
    local_path,
    no_stdlib,
    no_text,
    stdlib_paths,
    warn_of_binary,
)
from graphmoe.data.held_out import Facts, cut_position, hold_out, survey, too_small
from graphmoe.data.hub import HubText, open_hub
from graphmoe.data.pieces import cut_chunks
from graphmoe.data.progress import Progress
from graphmoe.data.shard_files import has_shards
from graphmoe.data.tokenizer import PIECE, spread
from graphmoe.errors import DataError

KEPT = 20_000_000  # characters of a stream that are kept, to train a tokenizer on

Text = Iterable[str]  # a document in chunks


class Document(NamedTuple):
    """One document of a stream.

    Attributes:
        chunks: Its text, in chunks to be read once.
        held_out: Whether it is held out.
    """

    chunks: Text
    held_out: bool


@dataclass(frozen=True)
class Source:
    """A corpus that can be read several times.

    Attributes:
        name: What it is, such as ``"stdlib (Python 3.11.7)"``.
        documents: Begins to read all documents, in an order that does not change.
        sample: Begins to read pieces of training text, enough for a tokenizer.
        total: Size of the whole in ``unit``, or ``None`` where it is not known.
        unit: ``"byte"`` or ``"document"``.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    sample: Callable[[], Iterator[str]]
    total: int | None
    unit: str


def open_source(
    dataset: str,
    *,
    held_out: float = 0.1,
    seed: int = 0,
    split: str = "train",
    text_column: str | None = None,
    streaming: bool = True,
) -> Source:
    """Find a corpus and decide what of it is held out; local files are read once for that.

    Args:
        dataset: ``"stdlib"``, a text file, a folder of text or a Hugging Face data set, as in
            :func:`graphmoe.data.load_text`.
        held_out: Share to hold out, between 0 and 1.
        seed: Seed of the choice of held-out documents.
        split: The split of a Hugging Face data set to train on.
        text_column: Its column of text; by default ``text``, or the only column of strings.
        streaming: Whether to read it as it arrives instead of downloading all of it first.

    Raises:
        DataError: If there is no such corpus, it is no text, or nothing can be held out.
    """
    path = local_path(dataset, None)
    if path is None and dataset != "stdlib":
        return _hub(
            open_hub(dataset, split=split, text_column=text_column, streaming=streaming), held_out, seed
        )
    for field, value in (("split", split if split != "train" else None), ("text_column", text_column)):
        if value is not None:
            raise DataError("local text has none", field, "a data set of the hub, or nothing", value)
    if path is None:
        name = f"stdlib (Python {platform.python_version()})"
        found = _survey(stdlib_paths(), name, seed, lambda _: False, [])
        if not found:
            raise no_stdlib()
        return _many(name, found, held_out)
    if has_shards(path):
        raise DataError("these are token shards already", path, "text")
    if path.is_dir():
        binary: list[Path] = []
        found = _survey(folder_paths(path), str(path), seed, is_text, binary)
        warn_of_binary(path, binary)
        if not found:
            raise no_text(path)
    else:
        found = _survey([path], str(path), seed, lambda _: True, [])
        if not found:
            raise DataError("empty corpus", path, "a file with text in it")
    return _one(str(path), *found[0], held_out) if len(found) == 1 else _many(str(path), found, held_out)


def _survey(
    paths: Iterable[Path], name: str, seed: int, must_be_text: Callable[[Path], bool], binary: list[Path]
) -> list[tuple[Path, Facts]]:
    """Facts of every file that is a document; files that are no text, and may be none, go to ``binary``."""
    found = []
    with Progress(f"looking through {name}", None, "byte", patience=2.0) as progress:

        def watched(path: Path) -> Iterator[str]:
            for chunk in file_chunks(path):
                progress.advance(len(chunk.encode()), f"{len(found):,} documents" if found else "")
                yield chunk

        for path in paths:
            try:
                facts = survey(watched(path), seed)
            except NotText:
                if must_be_text(path):
                    raise
                binary.append(path)
                continue
            if not facts.blank:
                found.append((path, facts))
    return found


def _many(name: str, found: list[tuple[Path, Facts]], held_out: float) -> Source:
    """Files, of which whole ones are held out."""
    flags = hold_out([facts for _, facts in found], held_out, name)
    documents = [(path, flag) for (path, _), flag in zip(found, flags, strict=True)]
    characters = sum(facts.characters for (_, facts), flag in zip(found, flags, strict=True) if not flag)
    return Source(
        name,
        lambda: (Document(file_chunks(path), flag) for path, flag in documents),
        lambda: _pieces((file_chunks(path) for path, flag in documents if not flag), characters),
        sum(facts.num_bytes for _, facts in found),
        "byte",
    )


def _one(name: str, path: Path, facts: Facts, held_out: float) -> Source:
    """A file whose last part is held out."""
    cut = cut_position(file_chunks(path), facts.characters, held_out)

    def part(flag: bool) -> Document:
        start, stop = (cut, facts.characters) if flag else (0, cut)
        return Document(_between(file_chunks(path), start, stop), flag)

    for flag in (False, True):
        if not any(chunk.strip() for chunk in part(flag).chunks):
            raise too_small(name, facts.characters)
    return Source(
        name,
        lambda: (part(flag) for flag in (False, True)),
        lambda: _pieces([part(False).chunks], cut),
        facts.num_bytes,
        "byte",
    )


def _hub(text: HubText, held_out: float, seed: int) -> Source:
    """Rows; of a long stream without a split for evaluation, those with a small hash are held out."""
    kept, whole = _head(text.texts(text.train))
    if not kept:
        raise text.empty(text.train)
    if text.held_out is not None:
        if next(text.texts(text.held_out), None) is None:
            raise text.empty(text.held_out)
        training = kept

        def documents() -> Iterator[Document]:
            parts = ((text.train, False), (text.held_out, True))
            return (Document([row], flag) for split, flag in parts for row in text.texts(split))

    elif whole:
        flags = hold_out([survey([row], seed) for row in kept], held_out, text.name)
        training = [row for row, flag in zip(kept, flags, strict=True) if not flag]

        def documents() -> Iterator[Document]:
            return (Document([row], flag) for row, flag in zip(kept, flags, strict=True))

    else:
        training = [row for row in kept if not _drawn(row, held_out, seed)]

        def documents() -> Iterator[Document]:
            return (Document([row], _drawn(row, held_out, seed)) for row in text.texts(text.train))

    characters = sum(map(len, training))
    return Source(
        text.name,
        documents,
        lambda: _pieces(([row] for row in training), characters),
        text.num_rows(),
        "document",
    )


def _head(rows: Iterable[str]) -> tuple[list[str], bool]:
    """The first rows, of ``KEPT`` characters or a few more, and whether there are no others."""
    kept, characters = [], 0
    for row in rows:
        if characters >= KEPT:
            return kept, False
        kept.append(row)
        characters += len(row)
    return kept, True


def _drawn(row: str, held_out: float, seed: int) -> bool:
    """Whether the seeded hash of a text lies in the held-out share of all hashes."""
    digest = hashlib.sha256(b"%d\n" % seed + row.encode()).digest()
    return int.from_bytes(digest[:8]) < held_out * 2**64


def _pieces(documents: Iterable[Text], characters: int) -> Iterator[str]:
    return spread(chain.from_iterable(cut_chunks(chunks, PIECE) for chunks in documents), characters)


def _between(chunks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from ``start`` to ``stop`` of a text that comes in chunks."""
    seen = 0
    for chunk in chunks:
        if seen >= stop:
            return
        if seen + len(chunk) > start:
            yield chunk[max(0, start - seen) : stop - seen]
        seen += len(chunk)
