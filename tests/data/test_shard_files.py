import os
import random

import numpy as np
import pytest

from graphmoe.data import ShardedTokens, load_text, shard_files
from graphmoe.data.progress import Progress
from graphmoe.data.tokenizer import byte_tokenizer
from graphmoe.errors import DataError


def save(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def header(path, shape: str, descr: str = "<u2"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\x01\x00" * 4)


def test_one_shard_is_mapped_and_its_tail_held_out(tmp_path):
    ids = np.arange(1000, dtype=np.uint16)
    save(tmp_path, a=ids)
    for source in (tmp_path, tmp_path / "a.npy"):
        corpus = load_text(source, held_out=0.25)
        assert isinstance(corpus.train, np.memmap) and isinstance(corpus.held_out, np.memmap)
        np.testing.assert_array_equal(corpus.train, ids[:750])
        np.testing.assert_array_equal(corpus.held_out, ids[750:])
    assert corpus.vocab_size == 4096
    assert corpus.tokenizer is None
    assert corpus.held_out_bytes is None and corpus.bits_per_byte(1.0) is None


def test_last_of_several_shards_is_held_out(tmp_path):
    save(tmp_path, a=np.arange(5), b=np.arange(5, 9, dtype=np.uint8), c=np.arange(9, 12, dtype=">i4"))
    corpus = load_text(tmp_path, vocab_size=12)
    assert isinstance(corpus.train, ShardedTokens)
    assert corpus.train.tolist() == list(range(9))
    assert corpus.train.dtype == np.uint8
    assert corpus.held_out.tolist() == [9, 10, 11]
    assert corpus.num_documents == (2, 1)
    (tmp_path / "c.npy").unlink()
    assert isinstance(load_text(tmp_path, vocab_size=12).train, np.memmap)


def test_tokenizer_beside_the_shards_sets_the_vocabulary(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    save(tmp_path, a=np.frombuffer(b"some text", np.uint8), b=np.array([256]))
    corpus = load_text(tmp_path)
    assert corpus.vocab_size == 257
    assert corpus.tokenizer.decode(corpus.train) == "some text"
    save(tmp_path, b=np.array([257]))
    with pytest.raises(DataError, match=r"b\.npy: .*0 to 256 .*got 257"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([1, 2, 4096]), "outside the vocabulary.*0 to 4095.*got 4096"),
        (np.array([1, -7]), "negative.*got -7"),
        (np.array([1.0, 2.0]), "float64"),
        (np.array([True, False]), "bool"),
        (np.array([{}, {}]), "object"),
        (np.array(["a", "b"]), "<U1"),
        (np.zeros((2, 2), dtype=int), r"shape \(2, 2\)"),
        (np.array(3), r"shape \(\)"),
        (np.array([], dtype=int), "empty shard"),
        (np.array([5]), "too small to hold anything out"),
    ],
)
def test_shards_that_hold_no_token_ids(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy: .*" + message):
        load_text(tmp_path)


def test_a_bad_id_behind_the_first_chunk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("graphmoe.data.corpus.CHUNK", 10)
    ids = np.arange(95)
    ids[93] = 5000
    save(tmp_path, a=np.arange(50), b=ids)
    with pytest.raises(DataError, match=r"b\.npy: .*got 5000"):
        load_text(tmp_path)


def test_layout_of_the_original_systems(tmp_path):
    """``tokens_000.npy`` and so on, of any integer dtype, without a tokenizer."""
    parts = np.split(np.random.default_rng(0).integers(0, 500, 3000), [900, 1000, 2500])
    for index, part in enumerate(parts):
        np.save(tmp_path / f"tokens_{index:03}.npy", part.astype(("i4", "u2", ">i8", "i2")[index]))
    corpus = load_text(tmp_path, vocab_size=500)
    assert corpus.train.tolist() == np.concatenate(parts[:3]).tolist()
    assert corpus.held_out.tolist() == parts[3].tolist()
    assert (corpus.vocab_size, corpus.tokenizer, corpus.held_out_bytes) == (500, None, None)
    copy = tmp_path / "one"
    copy.mkdir()
    np.save(copy / "a.npy", np.concatenate(parts[:3]))
    np.save(copy / "b.npy", parts[3])
    assert load_text(copy, vocab_size=500).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("descr", ["<u2", ">u2", "<i4", ">i8", "|u1", "=u8", "<i2"])
def test_dtypes_and_byte_orders(tmp_path, descr):
    ids = np.arange(120).astype(descr)
    np.save(tmp_path / "a.npy", np.asfortranarray(ids))
    header = (tmp_path / "a.npy").read_bytes().replace(b"'fortran_order': False", b"'fortran_order': True ")
    (tmp_path / "a.npy").write_bytes(header)
    corpus = load_text(tmp_path, held_out=0.25)
    assert [*corpus.train.tolist(), *corpus.held_out.tolist()] == list(range(120))


@pytest.mark.parametrize("seed", range(250))
def test_a_damaged_file_is_refused_or_reads_the_same(tmp_path, seed):
    """Bits of the header flipped, the file cut or continued: never other tokens, never another error."""
    rng = random.Random(seed)
    ids = np.random.default_rng(seed).integers(0, 4096, 500).astype("<u2")
    np.save(tmp_path / "a.npy", ids)
    data = bytearray((tmp_path / "a.npy").read_bytes())
    how = rng.choice(["flip", "flip", "flip", "replace", "cut", "extend"])
    if how == "flip":
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            data[rng.randrange(128)] ^= 1 << rng.randrange(8)
    elif how == "replace":
        data[rng.randrange(128)] = rng.choice(b"(),'0123456789:<>=|uifOVTrue \n\\")
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data += rng.randbytes(rng.randint(1, 300))
    (tmp_path / "a.npy").write_bytes(data)
    try:
        corpus, message = load_text(tmp_path, held_out=0.1), None
    except DataError as error:
        corpus, message = None, str(error)
    if corpus is None:
        assert "a.npy: " in message and "\n" not in message
    else:
        assert [*corpus.train.tolist(), *corpus.held_out.tolist()] == ids.tolist()


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy: not a file"):
        load_text(tmp_path)
    (tmp_path / "a.npy").unlink()
    (tmp_path / "a.npy").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a\.npy: not a file"):
        load_text(tmp_path)
    (tmp_path / "a.npy").unlink()
    (tmp_path / "a.npy").mkdir()
    with pytest.raises(DataError, match=r"a\.npy: not a file"):
        load_text(tmp_path)


def test_a_long_check_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("graphmoe.data.corpus.CHUNK", 10)
    monkeypatch.setattr(
        shard_files, "Progress", lambda *args, patience: Progress(*args, patience=0.0, every=0.0)
    )
    save(tmp_path, a=np.arange(50), b=np.arange(30))
    load_text(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[-1].startswith(f"checking {tmp_path}: 80 of 80 tokens")


@pytest.mark.parametrize("size", [0, 5, 60, 129, 2127, 2129])
def test_shard_of_the_wrong_size(tmp_path, size):
    save(tmp_path, a=np.arange(1000, dtype=np.uint16))
    data = (tmp_path / "a.npy").read_bytes() + b"x"
    (tmp_path / "a.npy").write_bytes(data[:size])
    with pytest.raises(DataError, match=r"a\.npy: (damaged shard|not a \.npy file)"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    "shape, descr",
    [
        ("(999999999999,)", "<u2"),
        ("(10**12,)", "<u2"),
        ("(-4,)", "<u2"),
        ("(True,)", "<u8"),
        ("(4,)", "|O"),
        ("__import__('os').abort()", "<u2"),
        ("(" * 2000, "<u2"),
    ],
)
def test_hostile_headers(tmp_path, shape, descr):
    header(tmp_path / "a.npy", shape, descr)
    with pytest.raises(DataError, match=r"a\.npy") as raised:
        load_text(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments, field", [({"vocab_size": 0}, "vocab_size"), ({"tokenizer": "bytes"}, "tokenizer")]
)
def test_arguments_that_do_not_fit_shards(tmp_path, arguments, field):
    save(tmp_path, a=np.arange(10))
    with pytest.raises(DataError, match=field):
        load_text(tmp_path, **arguments)
