import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_hub import Rows, serve

from graphmoe.data import Corpus, load_text, shards, sources
from graphmoe.data.manifest import MANIFEST, read_manifest
from graphmoe.data.shard_folder import only_writer
from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.data.tokenizer import train_bpe
from graphmoe.data.write_shards import write_shards
from graphmoe.errors import ConfigError, DataError, GraphMoEError

ROOT = Path(__file__).parents[2]
WORDS = ["the", "cat", "sat", "mat,", "und", "Katze", "saß", "dort;", "猫は座った", "🙂", "x", "=", "f(y)"]


def text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["\n", " ", " ", "  ", "\n\n"]) for _ in range(words))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What a killed process has written is there without a flush; thousands of them take a minute."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Thirty documents, a blank and a binary one."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for index in range(30):
        (root / ("sub" if index % 3 else ".") / f"{index}.txt").write_text(text(index, 40 + 20 * index))
    (root / "blank.txt").write_text("\n")
    (root / "picture.png").write_bytes(b"\x89PNG\x00")
    return root


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(text(0, 6000))
    return path


def same(ours: Corpus, plain: Corpus) -> None:
    """Assert that two corpora hold the same in every respect but their names."""
    for mine, theirs in ((ours.train, plain.train), (ours.held_out, plain.held_out)):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
        assert mine.dtype == theirs.dtype
    for name in ("held_out_bytes", "train_bytes", "num_documents", "vocab_size", "fingerprint"):
        assert getattr(ours, name) == getattr(plain, name), name


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("shard_tokens", [1000, 10**6])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_shards_hold_what_the_text_holds(folder, book, tmp_path, tokenizer, shard_tokens):
    for number, source in enumerate((folder, book)):
        out = tmp_path / f"out{number}"
        options = {"tokenizer": tokenizer, "vocab_size": 400, "seed": 3, "held_out": 0.2}
        write_shards(source, out, shard_tokens=shard_tokens, **options)
        plain = load_text(source, **options)
        ours = load_text(out, tokenizer=tokenizer)
        same(ours, plain)
        assert ours.bits_per_byte(1.0) == plain.bits_per_byte(1.0)
        sizes = [np.load(path, mmap_mode="r").size for path in sorted(out.glob("train_*.npy"))]
        assert set(sizes[:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens
        assert isinstance(ours.train, ShardedTokens) == (len(sizes) > 1)


def test_large_files_are_read_in_parts_with_the_same_result(folder, book, tmp_path, monkeypatch):
    plain = {source: load_text(source, vocab_size=400) for source in (folder, book)}
    monkeypatch.setattr("graphmoe.data.documents.CHUNK", 97)  # cuts characters in two
    monkeypatch.setattr("graphmoe.data.tokenizer.PIECE", 50)
    monkeypatch.setattr("graphmoe.data.tokenizer.BATCH", 2000)
    for source in (folder, book):
        write_shards(source, tmp_path / "out", vocab_size=400, shard_tokens=777, overwrite=source == book)
        same(load_text(tmp_path / "out"), plain[source])


def test_a_pretrained_tokenizer_is_copied(book, tmp_path):
    train_bpe([text(1, 500)], 350).save_pretrained(tmp_path / "tool")
    name = str(tmp_path / "tool")
    write_shards(book, tmp_path / "out", tokenizer=name, shard_tokens=2000)
    shutil.rmtree(tmp_path / "tool")
    corpus = load_text(tmp_path / "out")
    document = corpus.tokenizer.decode(np.asarray(corpus.train), skip_special_tokens=True)
    assert book.read_text().startswith(document) and corpus.train_bytes == len(document.encode())


def test_bytes_and_documents_of_shards_add_up(folder, tmp_path):
    manifest = write_shards(folder, tmp_path / "out", tokenizer="bytes", shard_tokens=500)
    for part in (manifest.train, manifest.held_out):
        assert part.total("tokens") == part.total("bytes") + part.total("documents")
        for shard in part.shards:  # one byte a token, but for the ends of documents
            assert shard.tokens == shard.bytes + shard.documents
    assert read_manifest(tmp_path / "out") == manifest


# ---- Rows of the hub


def rows(count: int) -> list:
    return [text(index, 30) for index in range(count)]


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_streamed(monkeypatch, tmp_path, streaming, published):
    splits = {"train": Rows({"text": [*rows(50), " ", None], "n": list(range(52))})}
    if published:
        splits["test"] = Rows({"text": rows(5)[::-1], "n": list(range(5))})
    asked = serve(monkeypatch, **splits)
    write_shards("owner/name:en", tmp_path / "out", vocab_size=300, shard_tokens=500, streaming=streaming)
    assert asked == [("owner/name", "en", streaming)]
    same(load_text(tmp_path / "out"), load_text("owner/name:en", vocab_size=300))


def test_long_streams_are_split_row_by_row(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "KEPT", 3000)
    lines = rows(400) + rows(20)
    serve(monkeypatch, train=Rows({"text": lines}, count=False))
    write_shards("owner/name", tmp_path / "out", vocab_size=300, held_out=0.25, seed=1)
    corpus = load_text(tmp_path / "out")
    train, held_out = (
        corpus.tokenizer.decode(np.asarray(part)).split("<|endoftext|>")[:-1]
        for part in (corpus.train, corpus.held_out)
    )
    assert sorted(train + held_out) == sorted(lines)
    assert not set(train) & set(held_out)
    assert [line for line in lines if line in set(train)] == train
    assert 0.17 < len(held_out) / len(lines) < 0.33
    assert corpus.num_documents == (len(train), len(held_out))


def test_a_tokenizer_sees_a_bounded_part_of_a_stream(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "KEPT", 3000)
    served = Rows({"text": ["abab " * 20] * 40 + ["yzyz " * 20] * 400})
    serve(monkeypatch, train=served, validation=Rows({"text": ["v"]}))
    write_shards("owner/name", tmp_path / "out")
    tokens = load_text(tmp_path / "out").tokenizer.get_vocab()
    assert "ab" in tokens and "yz" not in tokens


def test_split_and_column_of_choice(monkeypatch, tmp_path):
    columns = {"title": ["a", "b"], "body": ["one", "two"]}
    serve(monkeypatch, big=Rows(columns, known=False), test=Rows(columns, known=False))
    options = {"tokenizer": "bytes", "split": "big", "text_column": "body"}
    write_shards("owner/name", tmp_path / "out", **options)
    assert load_text(tmp_path / "out").tokenizer.decode(load_text(tmp_path / "out").train[:3]) == "one"


@pytest.mark.parametrize(
    "options, splits, message",
    [
        ({}, {"other": Rows({"text": ["a"]})}, "no training split.*other"),
        ({"split": "big"}, {"train": Rows({"text": ["a"]})}, "no split big.*train"),
        ({}, {"train": Rows({"a": ["x"], "b": ["y"]})}, "which column is the text.*'a', 'b'"),
        ({}, {"train": Rows({"a": ["x"], "b": ["y"]}, known=False)}, "which column is the text.*'a', 'b'"),
        ({"text_column": "n"}, {"train": Rows({"a": ["x"], "n": [1]})}, "no such column.*named n.*'a'"),
        ({}, {"train": Rows({"text": ["x"] * 101 + [3]}, known=False)}, "not a column of text.*text: int"),
        ({}, {"train": Rows({"text": ["", " "]})}, "no text in a split.*train"),
        (
            {},
            {"train": Rows({"text": ["a", "b"]}), "test": Rows({"text": [""]})},
            "no text in a split.*test",
        ),
        ({}, {"train": Rows({"text": ["a", "a"]})}, "nothing to hold out"),
    ],
)
def test_data_sets_that_cannot_be_used(monkeypatch, tmp_path, options, splits, message):
    serve(monkeypatch, **splits)
    with pytest.raises(DataError, match=f"^owner/name: .*{message}"):
        write_shards("owner/name", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_stream_that_breaks_off_can_be_taken_up(monkeypatch, tmp_path):
    class Broken(Rows):
        broken = True

        def __getitem__(self, column):
            for index, row in enumerate(super().__getitem__(column)):
                if index == 300 and self.broken:
                    raise ConnectionError("reset by peer\nat all")
                yield row

    monkeypatch.setattr(sources, "KEPT", 3000)
    monkeypatch.setattr("graphmoe.data.tokenizer.BATCH", 2000)
    served = Broken({"text": rows(400)})
    serve(monkeypatch, train=served)
    options = {"tokenizer": "bytes", "shard_tokens": 3000}
    with pytest.raises(DataError, match=r"^owner/name: cannot be read, split train; got 'reset by peer'$"):
        write_shards("owner/name", tmp_path / "out", **options)
    assert len(read_manifest(tmp_path / "out").train.shards) > 3
    served.broken = False
    write_shards("owner/name", tmp_path / "out", resume=True, **options)
    write_shards("owner/name", tmp_path / "whole", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_stream_of_which_nothing_was_held_out(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "KEPT", 10)
    serve(monkeypatch, train=Rows({"text": rows(5)}))
    with pytest.raises(DataError, match="no document was held out"):
        write_shards("owner/name", tmp_path / "out", tokenizer="bytes", held_out=1e-9)
    with pytest.raises(DataError, match="unfinished"):
        load_text(tmp_path / "out")


# ---- Stopping and going on

SMALL = {"tokenizer": "bytes", "shard_tokens": 9000}


def killed_at(call: int, source: Path, out: Path, **options) -> bool:
    """Write shards in a child process that kills itself at its n-th rename or flush; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            left = iter(range(call, -1, -1))

            def counted(function):
                def wrapper(*args):
                    if next(left) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args)

                return wrapper

            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            write_shards(source, out, **SMALL, **options)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(folder, tmp_path):
    write_shards(folder, tmp_path / "whole", **SMALL)
    expected, fingerprint = files(tmp_path / "whole"), load_text(tmp_path / "whole").fingerprint
    kills = 0
    while killed_at(kills, folder, tmp_path / str(kills)):
        out = tmp_path / str(kills)
        begun = (out / MANIFEST).exists()
        if begun and not read_manifest(out).complete:
            with pytest.raises(DataError, match=r"unfinished token shards.*--resume"):
                load_text(out)
        write_shards(folder, out, resume=begun, **SMALL)
        assert files(out) == expected
        kills += 1
    assert kills > 40
    assert load_text(tmp_path / "0").fingerprint == fingerprint


def test_killed_again_and_again(folder, tmp_path):
    write_shards(folder, tmp_path / "whole", **SMALL)
    out, kills = tmp_path / "out", 0
    while killed_at(12, folder, out, resume=(out / MANIFEST).exists()):
        kills += 1
        assert kills < 30
    assert kills >= 3
    assert files(out) == files(tmp_path / "whole")


def test_nothing_has_its_name_before_it_is_on_the_disk(folder, tmp_path, monkeypatch):
    calls = []

    def name(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("flush", name(handle))))
    monkeypatch.setattr(
        os, "replace", lambda *paths: calls.append(("rename", Path(paths[1]).name)) or replace(*paths)
    )
    write_shards(folder, tmp_path / "out", **SMALL)
    renames = [index for index, (what, _) in enumerate(calls) if what == "rename"]
    for index in renames:
        target = calls[index][1]
        assert any((what == "flush" and target in draft) or target == draft for what, draft in calls[:index])
        assert ("flush", "out") in calls[index:]
    order = [target for what, target in calls if what == "rename"]
    for index, target in enumerate(order[:-2]):  # the last of each part are listed together
        if target.startswith("train"):
            assert MANIFEST in order[index + 1 : index + 3]
    assert order[0] == order[-1] == MANIFEST


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_is_reported_and_leaves_no_half_file(folder, tmp_path, monkeypatch, name):
    write_shards(folder, tmp_path / "whole", **SMALL)
    function, left = getattr(os, name), [0]

    def full(*args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)

    for count in range(1, 18, 2):
        out = tmp_path / f"out{count}"
        left[0] = count
        monkeypatch.setattr(os, name, full)
        with pytest.raises(DataError, match=rf"^{out}.*could not be written; got 'No space left on device'$"):
            write_shards(folder, out, **SMALL)
        monkeypatch.setattr(os, name, function)
        assert not [path for path in files(out) if path.endswith(".part")]
        write_shards(folder, out, resume=(out / MANIFEST).exists(), **SMALL)
        assert files(out) == files(tmp_path / "whole")


@pytest.fixture
def stopped(folder, tmp_path) -> Path:
    """A folder in which three shards are finished."""
    out = tmp_path / "stopped"
    killed_at(30, folder, out)
    assert len(read_manifest(out).train.shards) >= 3
    return out


def test_a_text_that_has_changed_is_not_continued(folder, stopped):
    # The sizes and names stay, so that only the text itself can tell.
    path = next(path for path in (folder / "0.txt", folder / "3.txt") if path.exists())
    before = path.read_text()
    path.write_text(before.replace("cat", "dog"))
    with pytest.raises(DataError, match=r"the text is not the one.*--overwrite"):
        write_shards(folder, stopped, resume=True, **SMALL)
    path.write_text(before)
    for other in folder.rglob("*.txt"):
        other.write_text("short" + other.name)
    with pytest.raises(DataError, match="the text is not the one"):
        write_shards(folder, stopped, resume=True, **SMALL)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"held_out": 0.3}, {"tokenizer": "bpe"}, {"shard_tokens": 9}, {"text_column": "a"}],
)
def test_other_settings_do_not_go_on(folder, stopped, change):
    before = files(stopped)
    (name,) = change
    with pytest.raises(ConfigError, match=f"--{name}: not what the finished shards were made with"):
        write_shards(folder, stopped, resume=True, **(SMALL | change))
    assert files(stopped) == before


def test_damage_to_what_is_finished_is_noticed_on_going_on(folder, stopped):
    damaged = stopped / "train_000001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_000001\.npy: damaged shard"):
        write_shards(folder, stopped, resume=True, **SMALL)
    damaged.unlink()
    with pytest.raises(DataError, match=r"train_000001\.npy: no such file"):
        write_shards(folder, stopped, resume=True, **SMALL)


def test_nothing_is_overwritten_by_accident(folder, book, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing to resume"):
        write_shards(folder, out, resume=True, **SMALL)
    write_shards(folder, out, **SMALL)
    before = files(out)
    for options, message in (
        ({}, "token shards exist; expected --overwrite"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_shards(book, out, **options, **SMALL)
    with pytest.raises(DataError, match="no such file"):
        write_shards(tmp_path / "missing", out, overwrite=True, **SMALL)
    assert write_shards(folder, out, resume=True, **SMALL).complete
    assert files(out) == before
    write_shards(book, out, overwrite=True, tokenizer="bytes")
    same(load_text(out), load_text(book, tokenizer="bytes"))
    assert not set(before) - set(files(out)) & {"token_shards.json", "tokenizer.json"}
    assert len(list(out.glob("*.npy"))) == 2


@pytest.mark.parametrize("content", ["note.txt", "train_000000.npy", "tokenizer.json"])
def test_a_folder_of_something_else_is_left_alone(folder, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / content).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds something else"):
            write_shards(folder, tmp_path / "out", overwrite=overwrite, **SMALL)
    assert files(tmp_path / "out") == {content: b"mine"}


def test_one_writer_at_a_time(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"), pytest.raises(DataError, match="another process is writing"):
        write_shards(folder, tmp_path / "out", **SMALL)
    write_shards(folder, tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"held_out": 1.0}, "--held_out"),
        ({"held_out": float("nan")}, "--held_out"),
        ({"shard_tokens": 0}, "--shard_tokens"),
        ({"vocab_size": 256}, "--vocab_size"),
        ({"seed": -1}, "--seed"),
        ({"split": "test"}, "split: local text has none"),
        ({"text_column": "text"}, "text_column: local text has none"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, options, message):
    with pytest.raises(GraphMoEError, match=message):
        write_shards(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_corpora_that_cannot_be_written(folder, tmp_path):
    write_shards(folder, tmp_path / "out", **SMALL)
    with pytest.raises(DataError, match="token shards already"):
        write_shards(tmp_path / "out", tmp_path / "other", **SMALL)
    with pytest.raises(ConfigError, match="--out_dir: lies in the corpus"):
        write_shards(folder, folder / "out", **SMALL)
    for name, content, message in (
        ("empty.txt", b"", "empty corpus"),
        ("tiny.txt", b"x", "too small to hold anything out"),
        ("latin.txt", b"caf\xe9 " * 400_000, "not a text file"),
        ("cut.txt", b"x " * 10 + "é".encode()[:1], "not a text file"),
        ("nul.txt", b"x " * 600_000 + b"\0", "not a text file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            write_shards(tmp_path / name, tmp_path / "other", **SMALL)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no text in this folder"):
        write_shards(tmp_path / "bare", tmp_path / "other", **SMALL)
    assert not (tmp_path / "other").exists()


# ---- The command


def test_command(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert shards.main([str(folder), "--out_dir", out, "--tokenizer", "bytes", "--shard_tokens", "5000"]) == 0
    printed = capsys.readouterr().out.splitlines()
    corpus = load_text(out)
    assert printed[0].startswith(f"train: {corpus.train_bytes / 1e6:.2f} MB, {corpus.train.size:,} tokens")
    assert printed[-1] == f"train on it with: --dataset {out}"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["missing", "--out_dir", "OUT"], "no such file or folder"),
        (["stdlib"], "--out_dir"),
        (["stdlib", "--out_dir", "OUT", "--shard_tokens", "many"], "--shard_tokens"),
        (["stdlib", "--out_dir", "OUT", "--shard", "5"], "--shard"),
        (["stdlib", "--out_dir", "OUT", "--held_out", "2"], "--held_out"),
        (["stdlib", "--out_dir", "/dev/null"], "not a folder"),
        (["stdlib", "--out_dir", "x" * 300, "--tokenizer", "bytes"], "could not be written"),
        (["owner/name", "--out_dir", "OUT"], r"pip install \"graphmoe\[data\]\""),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    assert shards.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message.replace("\\", "") in captured.err
    assert not captured.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_go_on(tmp_path, signum, code):
    source, out = tmp_path / "book.txt", tmp_path / "out"
    source.write_text("a line of text\n" * 2_000_000)
    flags = [str(source), "--out_dir", str(out), "--tokenizer", "bytes", "--shard_tokens", "200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "graphmoe.data.shards", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (out / "train_000001.npy").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].endswith("the same command with --resume goes on")
    assert not [path.name for path in out.iterdir() if path.name.endswith(".part")]
    assert shards.main([*flags, "--resume"]) == 0
    corpus = load_text(out)
    assert corpus.train_bytes + corpus.held_out_bytes == source.stat().st_size
    assert (np.asarray(corpus.train)[:-1].reshape(-1, 15) == np.asarray(corpus.train)[:15]).all()


# ---- Damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    (root / "book.txt").write_text(text(0, 2000))
    write_shards(root / "book.txt", root / "out", vocab_size=300, shard_tokens=1000)
    return root / "out"


@pytest.mark.parametrize("seed", range(150))
def test_any_damage_is_noticed(finished, tmp_path, seed):
    """A flipped bit, a cut or an addition anywhere, tokens and manifest included."""
    rng = random.Random(seed)
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = rng.choice(sorted(out.iterdir()))
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "flip", "cut", "extend", "remove"])
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "extend":
        data += rng.randbytes(rng.randint(1, 100))
    path.unlink()
    if how != "remove":
        path.write_bytes(data)
    try:
        corpus, message = load_text(out, vocab_size=300), None
    except DataError as error:
        corpus, message = None, str(error)
    if corpus is None:
        assert str(tmp_path) in message
    elif (out / MANIFEST).exists():
        same(corpus, load_text(finished))
    else:  # then the shards are plain ones, of the same tokens
        plain = load_text(finished)
        tokens = [*np.asarray(corpus.train), *np.asarray(corpus.held_out)]
        assert tokens == [*np.asarray(plain.train), *np.asarray(plain.held_out)]


def test_a_shard_that_is_not_listed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    np.save(tmp_path / "out" / "train_999999.npy", np.arange(5))
    with pytest.raises(DataError, match=r"train_999999\.npy: a shard that is not listed"):
        load_text(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["train"]["shards"][0].update(file="../../secret.npy"),
        lambda content: content["train"]["shards"][0].update(file="/etc/passwd"),
        lambda content: content["train"]["shards"][0].update(tokens=-1),
        lambda content: content["train"]["shards"][0].update(tokens=True),
        lambda content: content["train"]["shards"][0].update(sha256="x"),
        lambda content: content["train"]["shards"].append(content["train"]["shards"][0]),
        lambda content: content["train"].update(shards={}),
        lambda content: content["train"].update(extra=1),
        lambda content: content.update(train=[]),
        lambda content: content.update(complete=1),
        lambda content: content.update(settings=[]),
        lambda content: content.update(version=2),
        lambda content: content.update(tokenizer={}),
        lambda content: content.update(tokenizer={"../x": "0" * 64}),
        lambda content: content["held_out"].update(shards=[]),
        lambda content: content.pop("name"),
    ],
)
def test_hostile_manifests(finished, tmp_path, change, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    monkeypatch.setattr("graphmoe.data.manifest._digest", lambda _: content["sha256"])
    with pytest.raises(DataError, match=MANIFEST) as raised:
        load_text(tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{", b"[" * 10**5, b'{"version": 1}', b"1e999"])
def test_manifests_that_are_none(finished, tmp_path, data):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(data)
    with pytest.raises(DataError, match=MANIFEST):
        load_text(tmp_path / "out")
