import json
import random
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graphmoe.data import tokenizer as module
from graphmoe.data.tokenizer import END_OF_TEXT, build_tokenizer, byte_tokenizer, cut, encode, train_bpe
from graphmoe.errors import DataError

CODE = "def f(x):\n\treturn x  # café, 日本語 🙂 e\u0301\r\n\n\n    don't"
TEXT = CODE + "\x00\x1c\u2003 \u0085 end <|endoftext|> "


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tool(request):
    return build_tokenizer(request.param, ["def f(x):\n    return x\n" * 40, "some more text " * 30], 300)


def test_decoding_restores_the_text(tool):
    assert tool.decode(tool.encode(TEXT)) == TEXT
    assert tool.encode(END_OF_TEXT) == [tool.eos_token_id]
    assert set(tool(TEXT)) == {"input_ids", "attention_mask"}


def test_saved_tokenizer_loads_with_the_auto_class(tool, tmp_path):
    tool.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        assert loaded.encode(TEXT) == tool.encode(TEXT)
        assert loaded.decode(loaded.encode(TEXT)) == TEXT
        assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (END_OF_TEXT,) * 3
        assert len(loaded) == len(tool)


def test_byte_ids_are_byte_values():
    tool = byte_tokenizer()
    assert tool.encode(CODE) == list(CODE.encode())
    assert tool.eos_token_id == 256
    assert len(tool) == 257
    tokens = encode(tool, ["é", END_OF_TEXT], "bytes")
    assert tokens.tolist() == [*"é".encode(), 256, *END_OF_TEXT.encode(), 256]


def test_bpe_is_deterministic_and_keeps_to_the_vocabulary():
    text = "the cat sat on the mat and the dog sat on the cat\n" * 20
    tools = [train_bpe([text], 270) for _ in range(2)]
    assert tools[0].backend_tokenizer.to_str() == tools[1].backend_tokenizer.to_str()
    assert len(tools[0]) == 270
    assert len(tools[0].encode(text)) < len(text) / 1.5
    assert len(train_bpe(["every word once"], 4096)) < 300


def test_bpe_learns_from_all_over_a_corpus_too_long_to_read_whole(monkeypatch):
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 20_000)
    monkeypatch.setattr(module, "PIECE", 1_000)
    tool = train_bpe(["alpha " * 10_000 + "omega " * 10_000], 300)
    assert len(tool.encode(" alpha omega")) == 2


@pytest.mark.parametrize("size", [1, 7, 100])
def test_cutting_a_long_document_changes_no_token(size, monkeypatch):
    rng = random.Random(size)
    alphabet = " \n\t\r\x1c\u0085\u00a0\u2003ab1'.sé日🙂\u0301"
    texts = ["".join(rng.choices(alphabet, k=2_000)) for _ in range(10)] + ["word " * 500]
    tool = train_bpe(texts, 400)
    whole = [token for text in texts for token in [*tool.encode(text), tool.eos_token_id]]
    monkeypatch.setattr(module, "PIECE", size)
    monkeypatch.setattr(module, "BATCH", 5_000)
    assert encode(tool, texts, "bpe").tolist() == whole
    pieces = list(cut(texts[-1], size))
    assert "".join(pieces) == texts[-1]
    assert len(pieces) >= len(texts[-1]) // (size + 5)


def test_a_document_cannot_forge_its_end(tool):
    name = "bytes" if len(tool) == 257 else "bpe"
    tokens = encode(tool, [TEXT, "b"], name)
    assert (tokens == tool.eos_token_id).sum() == 2
    assert tokens[-1] == tool.eos_token_id
    assert tokens.dtype == np.uint16
    assert tool.decode(tokens[:-3]) == TEXT
    assert tool.encode(END_OF_TEXT) == [tool.eos_token_id]  # the tokenizer itself is left as it was


def test_pretrained_folder(tmp_path):
    original = train_bpe(["one two three one two three " * 20], 280)
    original.backend_tokenizer.enable_truncation(4)
    original.save_pretrained(tmp_path)
    loaded = build_tokenizer(str(tmp_path), [], 0)
    tokens = encode(loaded, ["one two three " * 50], str(tmp_path))
    assert loaded.decode(tokens[:-1]) == "one two three " * 50  # not cut to 4 tokens


def damage(folder, how):
    path = folder / "tokenizer.json"
    if how == "absent":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "cut short":
        path.write_text(path.read_text()[:-100])
    elif how == "no vocabulary":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "BPE"}}))
    elif how == "no end of text":
        (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("how", ["absent", "cut short", "no vocabulary", "no end of text"])
def test_damaged_pretrained_folder(tmp_path, how):
    byte_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(DataError, match=str(tmp_path)) as raised:
        encode(build_tokenizer(str(tmp_path), [], 0), ["text"], str(tmp_path))
    assert "\n" not in str(raised.value)


def test_unreachable_hub_name(monkeypatch):
    def fail(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(module, "_on_hub", fail)
    with pytest.raises(DataError, match=r"^nobody/nothing: no usable tokenizer; .*got 'no network'$"):
        build_tokenizer("nobody/nothing", [], 0)


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(DataError, match=r"vocab_size: .*at least 257.*got 256"):
        train_bpe(["text"], 256)
