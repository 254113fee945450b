"""Turn a corpus into token shards that every language-model recipe reads with ``--dataset DIR``.

    python -m graphmoe.data.shards stdlib --out_dir data/stdlib
    python -m graphmoe.data.shards owner/name --out_dir data/name --tokenizer gpt2

Whatever the size of the corpus, some hundred MB of memory are enough: files are read in parts, data sets of
the Hugging Face hub are streamed, and tokens go straight to the disk. The folder gets ``train_*.npy`` and
``valid_*.npy``, the tokenizer, and ``token_shards.json``, which says what is in them.
"""

import argparse
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from graphmoe.data.manifest import Manifest, read_manifest
from graphmoe.data.write_shards import SHARD_TOKENS, write_shards
from graphmoe.errors import ConfigError, DataError, GraphMoEError


class _Parser(argparse.ArgumentParser):
    """Reports a bad flag as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, "command line", "--help for the flags")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command.

    Raises:
        ConfigError: If they cannot be used.
    """
    parser = _Parser(
        prog="python -m graphmoe.data.shards",
        description="Turn a corpus into token shards, which language-model recipes read with --dataset DIR.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", metavar="SOURCE", help="stdlib, a text file, a folder of text, or a Hugging Face name")
    add("--out_dir", required=True, metavar="DIR", help="the folder to write")
    add("--tokenizer", default="bpe", help="bpe, bytes, or the folder or hub name of a pretrained one")
    add("--vocab_size", type=int, default=4096, help="largest vocabulary of bpe")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens a shard")
    add("--split", default="train", help="split of a Hugging Face data set to train on")
    add("--text_column", help="its column of text; otherwise text, or the only column of strings")
    add("--held_out", type=float, default=0.1, help="share to hold out, where no split is published for it")
    add("--seed", type=int, default=0, help="seed of the choice of held-out documents")
    add("--resume", action="store_true", help="go on behind the last finished shard")
    add("--overwrite", action="store_true", help="remove the shards that are there first")
    add(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read a Hugging Face data set as it arrives instead of downloading it first",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 2 after an error, which is one line on stderr; 130 or 143 after Ctrl-C or SIGTERM.
    """
    folder = None
    try:
        with _terminable():
            flags = vars(parse(argv))
            folder, began = Path(flags["out_dir"]), time.perf_counter()
            manifest = write_shards(**flags)
            _report(folder, manifest, time.perf_counter() - began, whole=not flags["resume"])
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\nstopped: {_rest(folder)}\n")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except GraphMoEError as error:
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
        return 2
    return 0


def _report(folder: Path, manifest: Manifest, seconds: float, *, whole: bool) -> None:
    """Say what is in the folder; how fast it was written only if all of it was written now."""
    for name, part in (("train", manifest.train), ("held out", manifest.held_out)):
        figures = f"{part.total('bytes') / 1e6:.2f} MB, {part.total('tokens'):,} tokens"
        print(f"{name}: {figures}, {part.total('documents'):,} documents, {len(part.shards):,} shards")
    num_bytes = manifest.train.total("bytes") + manifest.held_out.total("bytes")
    speed = f", {num_bytes / 1e6 / seconds:.1f} MB/s" if whole else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"{seconds:.1f} s{speed}, {peak:.0f} MB of memory at most")
    print(f"train on it with: --dataset {folder}")


def _rest(folder: Path | None) -> str:
    """What a stopped command has left behind, and how to go on."""
    try:
        manifest = None if folder is None else read_manifest(folder)
    except DataError:
        manifest = None
    if manifest is None:
        return "nothing was written"
    count = len(manifest.train.shards) + len(manifest.held_out.shards)
    return f"{count} shards are finished in {folder}; the same command with --resume goes on"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does, with its own number."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
