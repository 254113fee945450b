"""Writing token shards one after the other: each file is there as a whole or not at all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from graphmoe.data.manifest import Part, Shard
from graphmoe.data.pieces import Piece
from graphmoe.errors import DataError

DRAFT = ".part"  # ending of a file that is being written; never read


class PartWriter:
    """Writes the training or the held-out shards, of ``shard_tokens`` tokens each but for the last.

    Tokens go to the file as they come, under a temporary name; a full file is flushed to the disk,
    renamed, and passed on to ``commit``.

    Args:
        folder: The folder.
        prefix: What file names begin with; they sort in the order of the shards.
        part: The shards that are finished already, and where to go on.
        dtype: The dtype to write.
        shard_tokens: Tokens a shard.
        commit: Called whenever ``part`` has grown.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        part: Part,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        commit: Callable[[], None],
    ):
        self.folder, self.prefix, self.part = folder, prefix, part
        self.dtype, self.shard_tokens, self._commit = np.dtype(dtype).newbyteorder("<"), shard_tokens, commit
        self._to_skip, self._offset = part.pieces, part.offset
        self._pieces, self._text = 0, hashlib.sha256()
        self._bytes = 0
        self._file: BinaryIO | None = None

    def skip(self, piece: Piece) -> bool:
        """Whether a piece is wholly in the finished shards; it must be the text it was then.

        Raises:
            DataError: If the text up to here differs.
        """
        if not self._to_skip:
            return False
        self._to_skip -= 1
        self._note(piece, piece.text.encode())
        if not self._to_skip and not self._offset:
            self._compare()
        return True

    def add(self, piece: Piece, ids: np.ndarray) -> int:
        """Write the tokens of a piece; returns the bytes of its text.

        Raises:
            DataError: If the finished shards hold the beginning of another piece, or the file system
                refuses.
        """
        data = piece.text.encode()
        self._note(piece, data)
        done, self._offset = self._offset, 0
        if done:
            self._compare()
        if not ids.size:
            self._bytes += len(data)
        while done < ids.size:
            self._open()
            take = min(self.shard_tokens - self._tokens, ids.size - done)
            self._write(ids[done : done + take].astype(self.dtype).tobytes())
            self._tokens += take
            before, done = done, done + take
            words = max(1, ids.size - piece.last)  # the end of text stands for no byte
            self._bytes += len(data) * min(done, words) // words - len(data) * min(before, words) // words
            whole = done == ids.size
            self._documents += whole and piece.last
            if self._tokens == self.shard_tokens:
                self._close(*((self._pieces, 0) if whole else (self._pieces - 1, done)))
                self._commit()
        return len(data)

    def finish(self) -> None:
        """Close the last shard, which may be a smaller one.

        Raises:
            DataError: If the text ended before the place to go on from.
        """
        if self._to_skip or self._offset:
            raise self._changed()
        if self._file is not None:
            self._close(self._pieces, 0)

    def abort(self) -> None:
        """Close what is unfinished; its file is a draft, which the next writer of the folder removes."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, again
                self._file.close()
            self._file = None

    def _note(self, piece: Piece, data: bytes) -> None:
        self._pieces += 1
        self._text.update(data + (b"\xff" if piece.last else b""))  # a byte that no text holds

    def _path(self, suffix: str = "") -> Path:
        return self.folder / f"{self.prefix}_{len(self.part.shards):06}.npy{suffix}"

    def _open(self) -> None:
        if self._file is None:
            with write_errors(self._path()):
                self._file = self._path(DRAFT).open("wb")
            self._tokens = self._documents = 0
            self._digest = hashlib.sha256()
            self._header()

    def _header(self) -> None:
        """Write a header of the tokens so far; NumPy leaves room for any number, so its size is fixed."""
        fields = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self._tokens,),
        }
        with write_errors(self._path()):
            np.lib.format.write_array_header_1_0(self._file, fields)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        with write_errors(self._path()):
            self._file.write(data)

    def _close(self, pieces: int, offset: int) -> None:
        """Give the file its name, and note it with the place where the next one begins."""
        path = self._path()
        with write_errors(path):
            self._file.seek(0)
            self._header()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path(DRAFT), path)
            sync(self.folder)
        shard = Shard(path.name, self._tokens, self._bytes, self._documents, self._digest.hexdigest())
        shards = (*self.part.shards, shard)
        self.part = Part(shards, pieces, offset, self._text.hexdigest())
        self._file, self._bytes = None, 0

    def _compare(self) -> None:
        """Raise unless the text so far is that of the finished shards."""
        if self._text.hexdigest() != self.part.text_sha256:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            "the text is not the one that the finished shards were made of",
            self.folder,
            "the same text as before, or --overwrite",
        )


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says into a :class:`~graphmoe.errors.DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError("could not be written", path, got=error.strerror or str(error)) from error


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
