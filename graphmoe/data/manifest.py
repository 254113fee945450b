"""What ``token_shards.json`` says of a folder: which shards there are, of what text, whether that is all."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphmoe.errors import DataError

MANIFEST, TOKENIZER = "token_shards.json", "tokenizer.json"
VERSION = 1
LARGEST = 1 << 26  # bytes of a manifest that are read; some 300,000 shards
PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One finished file.

    Attributes:
        file: Its name, in the folder of the manifest.
        tokens: Token ids in it.
        bytes: UTF-8 bytes of the text they stand for; of a text that goes on in the next shard, the
            share of its tokens. Sums over shards are exact.
        documents: Documents that end in it.
        sha256: SHA-256 of the token ids as they are stored, without the header of the file.
    """

    file: str
    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """The training or the held-out shards, and where in their text the next one begins.

    Attributes:
        shards: The finished shards, in order.
        pieces: Pieces of text that are wholly in them.
        offset: Tokens of the next piece that are in them as well.
        text_sha256: SHA-256 of all those pieces, so that a text which has changed is not continued.
    """

    shards: tuple[Shard, ...] = ()
    pieces: int = 0
    offset: int = 0
    text_sha256: str = hashlib.sha256().hexdigest()

    def total(self, name: str) -> int:
        """Sum of ``tokens``, ``bytes`` or ``documents`` over the shards."""
        return sum(getattr(shard, name) for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The content of ``token_shards.json``.

    Attributes:
        name: What the tokens were read from.
        settings: What the writer was asked for; another run goes on only with the same.
        tokenizer: SHA-256 of each of the tokenizer's files; empty while there are none.
        train: The training shards.
        held_out: The held-out shards.
        complete: Whether every document is in them.
    """

    name: str
    settings: dict[str, Any]
    tokenizer: dict[str, str] = field(default_factory=dict)
    train: Part = field(default_factory=Part)
    held_out: Part = field(default_factory=Part)
    complete: bool = False

    def to_json(self) -> bytes:
        """The bytes of the file, with a digest by which a damaged one is known."""
        content = {"version": VERSION} | dataclasses.asdict(self)
        return json.dumps(content | {"sha256": _digest(content)}, indent=1).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; ``None`` if it has none.

    Raises:
        DataError: If it cannot be read, or is not what :meth:`Manifest.to_json` writes.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise DataError("not a file", path, "a manifest of token shards")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise DataError("file is too large", path, f"at most {LARGEST} bytes")
        content = json.loads(data.decode())
    except OSError as error:
        raise DataError("cannot be read", path, got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("malformed JSON", path, "a manifest of token shards", str(error)) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise DataError("not a manifest of token shards", path, f"an object of version {VERSION}")
    if content.pop("sha256", None) != _digest(content):
        raise DataError("damaged manifest", path, "content with the SHA-256 that is noted in it")
    del content["version"]
    manifest = _build(Manifest, content, path, "")
    files = [shard.file for part in (manifest.train, manifest.held_out) for shard in part.shards]
    if len(set(files)) != len(files):
        raise DataError("a shard is listed twice", path, "every file once")
    if manifest.complete and not (manifest.train.shards and manifest.held_out.shards):
        raise DataError("no shards listed", path, "training and held-out shards")
    if manifest.complete and TOKENIZER not in manifest.tokenizer:
        raise DataError("no tokenizer listed", path, TOKENIZER, sorted(manifest.tokenizer))
    return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("cannot be read", path, got=error.strerror) from error


def _build(cls: type, content: object, path: Path, where: str) -> Any:
    """An instance of a dataclass from parsed JSON, with every field of the type it should have."""
    fields = {item.name: item.type for item in dataclasses.fields(cls)}
    if not isinstance(content, dict) or set(content) != set(fields):
        got = sorted(content) if isinstance(content, dict) else content
        raise DataError(f"malformed {where or 'manifest'}", path, f"an object with {', '.join(fields)}", got)
    return cls(**{name: _convert(fields[name], content[name], path, where + name) for name in fields})


def _convert(kind: Any, value: object, path: Path, where: str) -> Any:
    """One field of a manifest."""
    if kind is Part:
        return _build(Part, value, path, f"{where}.")
    if kind == tuple[Shard, ...]:
        if not isinstance(value, list):
            raise DataError(f"malformed {where}", path, "a list", value)
        return tuple(_build(Shard, item, path, f"{where}.") for item in value)
    plain = {int: int, str: str, bool: bool, dict[str, Any]: dict, dict[str, str]: dict}[kind]
    good = type(value) is plain and not (plain is int and value < 0)
    if kind == dict[str, str]:
        good = good and all(PLAIN.fullmatch(name) and _is_digest(digest) for name, digest in value.items())
    if where.endswith("sha256"):
        good = good and _is_digest(value)
    elif where.endswith("file"):  # never a path that leads out of the folder
        good = good and PLAIN.fullmatch(value) and value.endswith(".npy")
    if not good:
        raise DataError(f"malformed {where}", path, f"a plain {plain.__name__}", value)
    return value


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_digest(value: object) -> bool:
    return type(value) is str and DIGEST.fullmatch(value) is not None
