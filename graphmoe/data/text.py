"""Text corpora for language models: one call from a name to training and held-out tokens."""

import os
import platform
from pathlib import Path

from graphmoe.data.corpus import Corpus, fingerprint
from graphmoe.data.documents import (
    folder_documents,
    local_path,
    read_text,
    stdlib_documents,
)
from graphmoe.data.held_out import split_documents, split_text
from graphmoe.data.hub import hub_documents
from graphmoe.data.shard_files import has_shards, load_shards
from graphmoe.data.tokenizer import build_tokenizer, encode, num_tokens
from graphmoe.errors import DataError


def load_text(
    dataset: str | os.PathLike = "stdlib",
    *,
    data_dir: str | os.PathLike | None = None,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    held_out: float = 0.1,
    seed: int = 0,
) -> Corpus:
    """Load a corpus, hold a part of it out, and tokenize both.

    What ``dataset`` may be, in the order in which it is looked for:

    * ``"stdlib"``: source and documentation of the running Python's standard library, about 11 MB and
      no download. A document is a file.
    * A text file. Its last ``held_out`` part is held out, cut at the beginning of a line.
    * A folder. With ``.npy`` files in it, they are shards of token ids in the order of their names, of
      any integer dtype: the last shard is held out, or the tail of the only one, and a ``tokenizer.json``
      beside them, where there is one, sets the vocabulary. ``python -m graphmoe.data.shards`` writes such
      folders and lists in them what is held out. Shards are mapped, never copied into memory.
      Otherwise every text file in it and below is a document; a folder with one text file is treated as
      that file.
    * A Hugging Face data set, ``"owner/name"``, ``"owner/name:config"`` or ``"name:config"``: the rows of
      split ``train``, in column ``text`` or the only column of strings, are documents. Those of
      ``validation`` or ``test`` are held out as published, if there are any. Needs the extra ``data``.

    Where documents are not held out by one of these rules, about a share ``held_out`` of the bytes is,
    in whole documents, at least one; equal documents stay together. Every document is followed by the
    end-of-text token; blank ones are left out.

    Args:
        dataset: Where the text comes from, as above.
        data_dir: Folder that a relative ``dataset`` lies in; with it, nothing is looked for elsewhere.
        tokenizer: ``"bpe"`` (byte-level BPE trained on the training documents), ``"bytes"`` (byte values
            and end of text), or the local folder or hub name of a pretrained tokenizer.
        vocab_size: Largest vocabulary of ``"bpe"``; for shards without a ``tokenizer.json``, the vocabulary
            that their ids must stay in. Unused otherwise.
        held_out: Share to hold out, between 0 and 1.
        seed: Seed of the choice of held-out documents.

    Raises:
        DataError: If the corpus is missing, empty, unreadable, damaged or too small to be split, or an
            argument is out of range. Nothing is replaced by another source or tokenizer.
    """
    if not 0 < held_out < 1:
        raise DataError("not a share", "held_out", "a number between 0 and 1", held_out)
    dataset = os.fspath(dataset)
    path = local_path(dataset, data_dir)
    if path is not None and has_shards(path):
        return load_shards(path, tokenizer=tokenizer, vocab_size=vocab_size, held_out=held_out)
    name, train, rest = _read(dataset, path, held_out, seed)
    tool = build_tokenizer(tokenizer, train, vocab_size)
    train_tokens, rest_tokens = (encode(tool, documents, tokenizer) for documents in (train, rest))
    return Corpus(
        name=name,
        train=train_tokens,
        held_out=rest_tokens,
        held_out_bytes=_num_bytes(rest),
        vocab_size=num_tokens(tool),
        tokenizer=tool,
        num_documents=(len(train), len(rest)),
        fingerprint=fingerprint(train_tokens, rest_tokens, tool),
        train_bytes=_num_bytes(train),
    )


def _read(dataset: str, path: Path | None, held_out: float, seed: int) -> tuple[str, list[str], list[str]]:
    """Name, training documents and held-out documents."""
    if path is not None:
        name = str(path)
        documents = folder_documents(path) if path.is_dir() else [read_text(path)]
        if not documents[0].strip():
            raise DataError("empty corpus", path, "a file with text in it")
        if len(documents) == 1:
            train, rest = split_text(documents[0], held_out, name)
            return name, [train], [rest]
        return name, *split_documents(documents, held_out, seed, name)
    if dataset == "stdlib":
        name = f"stdlib (Python {platform.python_version()})"
        return name, *split_documents(stdlib_documents(), held_out, seed, name)
    train, rest = hub_documents(dataset)
    if rest is None:
        train, rest = split_documents(train, held_out, seed, dataset)
    return dataset, train, rest


def _num_bytes(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)
