import dataclasses
import math

import numpy as np
import pytest

from graphmoe.data import Corpus, unigram_loss
from graphmoe.data.corpus import fingerprint
from graphmoe.data.tokenizer import byte_tokenizer, train_bpe


def corpus(**changes) -> Corpus:
    values = {
        "name": "tiny",
        "train": np.array([0, 0, 0, 1], dtype=np.uint8),
        "held_out": np.array([0, 1, 2], dtype=np.uint8),
        "held_out_bytes": 6,
        "vocab_size": 3,
        "tokenizer": None,
        "num_documents": (2, 1),
        "fingerprint": "",
        "train_bytes": 2_500_000,
    }
    return Corpus(**(values | changes))


def test_unigram_loss_by_hand():
    # Counts 3, 1, 0 plus one each: probabilities 4/7, 2/7, 1/7.
    assert unigram_loss(corpus()) == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)


def test_unigram_loss_of_a_uniform_source_is_the_entropy():
    tokens = np.arange(64, dtype=np.uint16).repeat(100)
    assert unigram_loss(corpus(train=tokens, held_out=tokens, vocab_size=64)) == pytest.approx(math.log(64))


def test_bits_per_byte():
    # One bit a token, 3 tokens, 6 bytes.
    assert corpus().bits_per_byte(math.log(2)) == pytest.approx(0.5)
    assert corpus(held_out_bytes=None).bits_per_byte(1.0) is None


def test_describe_is_one_line():
    assert corpus().describe() == (
        "tiny: train 2.50 MB, 4 tokens, 2 documents; held out 0.00 MB, 3 tokens, 1 documents; vocabulary 3"
    )
    shards = corpus(train_bytes=None, held_out_bytes=None)
    assert shards.describe() == "tiny: train 4 tokens, 2 shards; held out 3 tokens, 1 shards; vocabulary 3"
    with pytest.raises(dataclasses.FrozenInstanceError):
        shards.name = "other"


def test_fingerprint_follows_the_data_and_not_its_storage():
    train, held_out = np.arange(10, dtype=np.uint8), np.arange(5, dtype=np.uint8)
    tools = byte_tokenizer(), train_bpe(["some text"], 300)
    marks = {
        fingerprint(train, held_out, None),
        fingerprint(held_out, train, None),
        fingerprint(np.append(train, 0), held_out[1:], None),  # the same bytes, cut elsewhere
        fingerprint(train[::-1], held_out, None),
        *(fingerprint(train, held_out, tool) for tool in tools),
    }
    assert len(marks) == 6
    assert fingerprint(train.astype(">i8"), held_out, None) == fingerprint(train, held_out, None)


def test_split_held_out_cuts_behind_a_document():
    tool = byte_tokenizer()
    end, text = tool.eos_token_id, "åbc de\n"
    ids = [*tool(text)["input_ids"], end, *tool(text * 3)["input_ids"], end]
    whole = corpus(
        held_out=np.array(ids, dtype=np.uint16),
        held_out_bytes=4 * len(text.encode()),
        vocab_size=257,
        tokenizer=tool,
    )
    first, second = whole.split_held_out()
    assert first.held_out.tolist() == ids[: len(text.encode()) + 1]
    assert first.held_out_bytes == len(text.encode()) and second.held_out_bytes == 3 * len(text.encode())
    assert np.concatenate([first.held_out, second.held_out]).tolist() == ids
    assert first.train is whole.train and len({first.fingerprint, second.fingerprint, whole.fingerprint}) == 3


def test_split_held_out_of_one_document_or_of_bare_tokens():
    tool = byte_tokenizer()
    ids = tool("abcdefgh")["input_ids"]
    one = corpus(held_out=np.array(ids, dtype=np.uint16), held_out_bytes=8, vocab_size=257, tokenizer=tool)
    first, second = one.split_held_out()
    assert (first.held_out.size, second.held_out.size) == (4, 4)
    assert (first.held_out_bytes, second.held_out_bytes) == (4, 4)
    bare = corpus(held_out_bytes=None).split_held_out()
    assert [part.held_out_bytes for part in bare] == [None, None]
    assert [part.held_out.tolist() for part in bare] == [[0], [1, 2]]
