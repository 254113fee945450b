"""Tokenizers: byte-level BPE trained on a corpus, plain bytes or a pretrained one; and encoding with them."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphmoe.data.pieces import Piece, cut, cut_document
from graphmoe.errors import DataError, GraphMoEError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import Model
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_CHARACTERS = 5_000_000  # more text hardly changes 4,096 merges, but takes seconds longer
PIECE = 1 << 16  # characters encoded at a time, so that one long document uses every core
FOREIGN_PIECE = 1 << 20
BATCH = 1 << 22  # characters a batch: an encoding in flight takes some 50 times the memory of its ids


def build_tokenizer(name: str, documents: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Make or load the tokenizer called ``name``.

    Args:
        name: ``"bpe"``, ``"bytes"``, or the local folder or hub name of a pretrained tokenizer.
        documents: Training documents; only ``"bpe"`` reads them.
        vocab_size: Largest vocabulary of ``"bpe"``, at least 257: the bytes and the end of text. A corpus
            with few repeated words yields a smaller one.

    Raises:
        DataError: If ``vocab_size`` is too small, or the pretrained tokenizer cannot be loaded or used.
    """
    if name == "bpe":
        return train_bpe(documents, vocab_size)
    return byte_tokenizer() if name == "bytes" else pretrained_tokenizer(name)


def train_bpe(documents: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on a part of the documents that is spread evenly over all of them."""
    pieces = chain.from_iterable(cut(document, PIECE) for document in documents)
    return train_bpe_on(spread(pieces, sum(map(len, documents))), vocab_size)


def spread(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Pick pieces of about ``PIECE`` characters evenly, so that they make up ``TRAINING_CHARACTERS``.

    Args:
        pieces: The pieces of all documents.
        characters: How many characters they have together.
    """
    return islice(pieces, 0, None, max(1, -(-characters // TRAINING_CHARACTERS)))


def train_bpe_on(sample: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on texts, which are read once.

    Raises:
        DataError: If ``vocab_size`` is too small.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size < 257:
        raise DataError("too few tokens", "vocab_size", "at least 257: 256 bytes and end of text", vocab_size)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _byte_level(BPE())
    tokenizer.train_from_iterator(sample, trainer)
    return _wrap(tokenizer)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte, with the byte's value as its id; the end of text is 256."""
    from tokenizers.models import BPE

    # Byte-level models name a byte by the character of the same number where that can be printed, and
    # the remaining bytes, in order, by the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}
    tokenizer = _byte_level(BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def _byte_level(model: "Model") -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a local folder, from the local cache, or else from the Hugging Face hub.

    Raises:
        DataError: If it cannot be loaded or is no fast tokenizer.
    """
    from transformers import AutoTokenizer

    expected = "bpe, bytes, a folder with tokenizer.json, or a hub name that is cached or can be reached"
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
        except Exception:
            # Asked directly, the hub client would retry for most of a minute where there is no network.
            if Path(name).exists() or not _on_hub(name):
                raise
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, the hub client and the Rust parser share no base class
        raise DataError("no usable tokenizer", name, expected, first_line(error)) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            "no usable tokenizer", name, "a fast tokenizer (tokenizer.json)", type(tokenizer).__name__
        )
    return tokenizer


def _on_hub(name: str) -> bool:
    from huggingface_hub import HfApi

    return HfApi().repo_exists(name)


def first_line(error: Exception) -> str:
    """The first line of an error's text, so that it fits in a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def num_tokens(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id, which a vocabulary with gaps does not reveal by its length."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(tokenizer: "PreTrainedTokenizerFast", documents: list[str], name: str) -> np.ndarray:
    """Encode documents, each followed by the end-of-text token, into one array.

    Special tokens spelled out in a document are encoded as ordinary text, so that no document can
    forge its end. A document longer than 2^20 characters is encoded in parts cut between words,
    which pretrained tokenizers that mark the beginning of a text can tell; the two own ones cannot.

    Args:
        tokenizer: The tokenizer.
        documents: The texts.
        name: What :func:`build_tokenizer` was asked for.

    Returns:
        Token ids, ``[tokens]``, in the smallest unsigned dtype that holds them.

    Raises:
        DataError: If the tokenizer has no end-of-text token or fails on a document.
    """
    size = piece_size(name)
    pieces = (piece for document in documents for piece in cut_document([document], size, held_out=False))
    return np.concatenate([ids for _, ids, _ in encode_pieces(tokenizer, pieces, name)])


def piece_size(name: str) -> int:
    """Characters of the pieces that the tokenizer called ``name`` encodes at a time."""
    return PIECE if name in ("bpe", "bytes") else FOREIGN_PIECE


def encode_pieces(
    tokenizer: "PreTrainedTokenizerFast", pieces: Iterable[Piece], name: str
) -> Iterator[tuple[list[Piece], np.ndarray, list[int]]]:
    """Encode a stream of pieces as :func:`encode` does whole documents, some of them at a time.

    Args:
        tokenizer: The tokenizer.
        pieces: Documents, cut by :func:`cut_document` into pieces of :func:`piece_size`.
        name: What :func:`build_tokenizer` was asked for.

    Yields:
        Some pieces; their token ids end to end, ``[tokens]``, with the end-of-text token behind the last
        piece of a document, in the smallest unsigned dtype that holds the vocabulary; how many
        tokens each piece has of them.

    Raises:
        DataError: If the tokenizer has no end-of-text token or fails on a document.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer cannot end a document", name, "a tokenizer with an eos_token")
    dtype, ends = token_dtype(tokenizer), ([], [tokenizer.eos_token_id])
    try:
        encode_batch = _bytes_of if name == "bytes" else _neutral(tokenizer).encode_batch_fast
        for batch in _batches(pieces):
            items = encode_batch([piece.text for piece in batch], add_special_tokens=False)
            counts = [len(item) + piece.last for item, piece in zip(items, batch, strict=True)]
            pairs = zip(items, batch, strict=True)
            if name == "bytes":
                parts = ((item, np.array(ends[piece.last], dtype)) for item, piece in pairs)
                ids = np.concatenate([*chain.from_iterable(parts)], dtype=dtype)
            else:
                parts = ((item.ids, ends[piece.last]) for item, piece in pairs)
                ids = np.fromiter(chain.from_iterable(chain.from_iterable(parts)), dtype, sum(counts))
            del items  # takes many times the memory of the ids
            yield batch, ids, counts
    except GraphMoEError:  # of reading the pieces
        raise
    except Exception as error:  # the Rust side raises Exception itself
        raise DataError("the tokenizer cannot encode", name, got=first_line(error)) from error


def _bytes_of(texts: list[str], *, add_special_tokens: bool) -> list[np.ndarray]:
    """The bytes of texts, behind the same call as those of a backend."""
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def token_dtype(tokenizer: "PreTrainedTokenizerFast") -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.min_scalar_type(num_tokens(tokenizer) - 1)


def _neutral(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """A copy of the backend that neither cuts nor pads a text, nor looks for special tokens in it."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces with about ``BATCH`` characters each."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
