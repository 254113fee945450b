"""Labelled texts: who is in which part, nothing leaks, and a bad file is named."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_hub import Rows, serve

from graphmoe.data import docstrings, label_files
from graphmoe.data.labelled_text import PARTS, load_classification
from graphmoe.errors import DataError


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


def write_ag_news(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return path


def sizes(monkeypatch, name: str, **rows: int) -> None:
    """Let a published data set have so many rows."""
    known = label_files.PUBLISHED[name]
    changed = {part: (file, rows.get(part, count)) for part, (file, count) in known.rows.items()}
    monkeypatch.setitem(label_files.PUBLISHED, name, known._replace(rows=changed))


NEWS = [(str(1 + n % 4), f"title {n}", f"what\\happened {n}") for n in range(40)]
TWO = [(f"text number {n}", "ab"[n % 2]) for n in range(60)]


@pytest.fixture(scope="module")
def library():
    return load_classification("docstrings")


def all_texts(data) -> list[str]:
    return [" ".join(text.split()) for part in PARTS for text in getattr(data, part).texts]


def test_docstrings_come_from_the_largest_packages(library):
    assert library.num_classes == 4 == len(set(library.class_names))
    total = sum(len(getattr(library, part)) for part in PARTS)
    assert total > 1000
    texts = all_texts(library)
    assert len(set(texts)) == len(texts) and all(texts)
    for name, package in zip(library.class_names, library.class_names, strict=True):
        assert (Path(sys.modules["os"].__file__).parent / package / "__init__.py").exists(), name
    for part in PARTS:
        labels = getattr(library, part).labels
        share = np.bincount(labels, minlength=4) / len(labels)
        assert labels.dtype == np.int64 and (share > 0.05).all()
    assert 0.3 < library.majority() < 0.6
    assert str(len(library.train))[0] in library.describe() and library.class_names[0] in library.describe()


def test_docstrings_of_a_module_stay_together(library):
    _, rows = docstrings.docstring_rows(4)
    part_of = {text: part for part in PARTS for text in getattr(library, part).texts}
    modules: dict[str, set[str]] = {}
    for row in rows:
        modules.setdefault(row.group, set()).add(part_of[row.text])
    assert len(modules) > 50 and all(len(parts) == 1 for parts in modules.values())
    assert {row.text for row in rows} == set(part_of)
    for row in rows:
        assert row.group.startswith(f"{row.label}/")


def test_the_division_depends_on_the_seed_only(library):
    again, other = load_classification("docstrings"), load_classification("docstrings", seed=1)
    assert again.fingerprint == library.fingerprint != other.fingerprint
    assert again.test.texts == library.test.texts != other.test.texts
    assert set(all_texts(other)) == set(all_texts(library))


def test_own_files_are_divided_by_class(tmp_path):
    path = write_tsv(tmp_path / "mine.tsv", TWO)
    data = load_classification("mine.tsv", data_dir=tmp_path, validation=0.2, test=0.2)
    assert data.class_names == ("a", "b") and data.name == str(path)
    assert [len(getattr(data, part)) for part in PARTS] == [40, 8, 12]
    for part in PARTS:
        texts, labels = getattr(data, part).texts, getattr(data, part).labels
        assert np.bincount(labels).tolist() == [len(texts) // 2] * 2
        assert all(dict(TWO)[text] == "ab"[label] for text, label in zip(texts, labels, strict=True))
    table = tmp_path / "mine.csv"
    table.write_text(
        "id,label,text\n" + "".join(f'{n},{label},"{text}, ""so"""\n' for n, (text, label) in enumerate(TWO))
    )
    same = load_classification(table)
    assert same.class_names == ("a", "b") and same.train.texts[0].endswith(', "so"')


def test_equal_texts_are_kept_once(tmp_path):
    write_tsv(tmp_path / "mine.tsv", [*TWO, ("text  number 3 ", "b"), *TWO[:5]])
    data = load_classification(tmp_path / "mine.tsv")
    assert sorted(all_texts(data)) == sorted(text for text, _ in TWO)


def test_ag_news_as_published(tmp_path, monkeypatch):
    sizes(monkeypatch, "ag_news", test=40, train=40)
    write_ag_news(tmp_path / "ag_news" / "test.csv", NEWS)
    alone = load_classification("ag_news", data_dir=tmp_path)
    assert alone.class_names == ("World", "Sports", "Business", "Sci/Tech")
    assert sum(len(getattr(alone, part)) for part in PARTS) == 40
    assert "title 0 what happened 0" in all_texts(alone)
    assert load_classification("ag_news", data_dir=tmp_path / "ag_news").fingerprint == alone.fingerprint
    # With a training file the test file is the test part, and what is in it is in no other.
    train = [(label, f"old {title}", text) for label, title, text in NEWS[:39]] + NEWS[39:]
    write_ag_news(tmp_path / "ag_news" / "train.csv", train)
    both = load_classification("ag_news", data_dir=tmp_path)
    assert len(both.test) == 40 and len(both.train) + len(both.validation) == 39
    assert len(set(all_texts(both))) == 79


def test_sst2_as_published(tmp_path, monkeypatch):
    sizes(monkeypatch, "sst2", train=60)
    write_tsv(tmp_path / "sst2" / "train.tsv", [(text, "01"[label == "a"]) for text, label in TWO])
    data = load_classification("sst2", data_dir=tmp_path)
    assert data.class_names == ("negative", "positive") and len(data.test) == 12


def test_the_real_files(data_dir):
    news, films = (load_classification(name, data_dir=data_dir) for name in ("ag_news", "sst2"))
    assert sum(len(getattr(news, part)) for part in PARTS) == 7600
    assert abs(news.majority() - 0.25) < 0.01
    assert 6900 <= sum(len(getattr(films, part)) for part in PARTS) < 6920  # some sentences are there twice
    assert 0.5 < films.majority() < 0.54


def labelled(texts: list[str], labels: list, names: list[str] | None = None) -> Rows:
    rows = Rows({"text": texts, "label": labels})
    if names is not None:
        rows.features["label"] = SimpleNamespace(dtype="int64", names=names)
    return rows


def test_hub_rows(monkeypatch):
    def texts(part):
        return [f"{part} {n}" for n in range(40)]

    train = labelled(texts("train"), [n % 2 for n in range(40)], ["bad", "good"])
    validation = labelled(texts("validation"), [n % 2 for n in range(40)])
    unlabelled = labelled(texts("test"), [-1] * 40)
    serve(monkeypatch, train=train, validation=validation, test=unlabelled)
    data = load_classification("owner/name")
    assert data.class_names == ("bad", "good")
    # Without labels in the published test part, results are on the other published one.
    assert sorted(data.test.texts) == sorted(texts("validation"))
    assert [len(data.train), len(data.validation)] == [36, 4]
    serve(monkeypatch, train=train, validation=validation, test=labelled(texts("test"), [0, 1] * 20))
    data = load_classification("owner/name")
    assert [len(getattr(data, part)) for part in PARTS] == [40] * 3
    serve(monkeypatch, train=labelled(texts("train"), ["x", "y"] * 20))
    assert load_classification("owner/name").class_names == ("x", "y")
    serve(monkeypatch, train=Rows({"text": texts("train"), "a": [0, 1] * 20, "b": [0, 1] * 20}))
    with pytest.raises(DataError, match="no telling which column"):
        load_classification("owner/name")
    serve(monkeypatch, train=labelled([*texts("train"), " "], [0, 1] * 20 + [1]))
    with pytest.raises(DataError, match="owner/name, split train, row 40: a text is blank"):
        load_classification("owner/name")
    serve(monkeypatch, train=labelled(texts("train"), [0, 1] * 19 + [1, -1], ["bad", "good"]))
    with pytest.raises(DataError, match="owner/name, split train: a row has no label"):
        load_classification("owner/name")
    serve(monkeypatch, train=labelled(texts("train"), [0, 2] * 20, ["bad", "good"]))
    with pytest.raises(DataError, match="row 1: unknown label; expected 0 to 1; got 2"):
        load_classification("owner/name")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "one\tx\ntwo\tx\nthree\tx\n", "a.tsv: nothing to tell apart"),
        ("a.tsv", "one\tx\n \ty\n", "a.tsv, line 2: a text is blank"),
        ("a.tsv", "one\tx\ntwo\ty\nthr", "a.tsv, line 3: the file is malformed or cut short.*got 'thr'"),
        ("a.tsv", "one\tx\ntwo\t\n", "a.tsv, line 2: unknown label; expected a label"),
        ("a.tsv", "", "a.tsv: no labelled text"),
        ("a.tsv", "one\tx\ntwo\ty\n", "a.tsv: too few independent texts of class x"),
        ("a.tsv", b"one\tx\n\xff\ty\n", "a.tsv: not a text file"),
        ("a.csv", "words,class\none,x\n", "a.csv, line 1: no columns of texts and labels"),
        ("a.csv", "text,label\none,x\ntwo\n", "a.csv, line 3: the file is malformed or cut short.*2 columns"),
        ("a.csv", 'text,label\none,x\n"two, and', "a.csv, line 3: the file is malformed or cut short"),
        ("a.txt", "one\tx\n", "a.txt: no telling how texts and labels stand in it"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_classification(tmp_path / name)


def test_a_published_file_that_is_cut_short_is_named(tmp_path, monkeypatch):
    sizes(monkeypatch, "ag_news", test=40)
    path = write_ag_news(tmp_path / "ag_news" / "test.csv", NEWS)
    whole = path.read_bytes()
    for end in range(len(whole) - 1, len(whole) - 120, -1):  # wherever it is cut
        path.write_bytes(whole[:end])
        if end == len(whole) - 1:  # only the end of the last line is missing
            load_classification("ag_news", data_dir=tmp_path)
            continue
        with pytest.raises(DataError, match=r"ag_news/test.csv(, line \d+)?: the file is"):
            load_classification("ag_news", data_dir=tmp_path)
    write_ag_news(path, [("5", "title", "text"), *NEWS[1:]])
    with pytest.raises(
        DataError, match=r"test.csv, line 1: unknown label; expected one of 1, 2, 3, 4; got '5'"
    ):
        load_classification("ag_news", data_dir=tmp_path)


def test_nothing_is_replaced_by_something_else(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"data_dir: ag_news is not downloaded.*ag_news/test.csv"):
        load_classification("ag_news")
    with pytest.raises(DataError, match=r"no file of sst2 here; expected sst2/train.tsv"):
        load_classification("sst2", data_dir=tmp_path)
    with pytest.raises(DataError, match="no such labelled texts; expected docstrings, ag_news, sst2"):
        load_classification("nonsense")
    with pytest.raises(DataError, match=r"nothing.tsv: no such labelled texts"):
        load_classification("nothing.tsv", data_dir=tmp_path)
    with pytest.raises(DataError, match="data_dir: docstrings do not lie in a folder"):
        load_classification("docstrings", data_dir=tmp_path)
    with pytest.raises(DataError, match="num_classes: the standard library has not so many packages"):
        load_classification("docstrings", num_classes=500)
    with pytest.raises(DataError, match="num_classes: nothing to tell apart"):
        load_classification("docstrings", num_classes=1)
    with pytest.raises(DataError, match="test: not a share"):
        load_classification("docstrings", test=0.0)
    monkeypatch.setattr(docstrings, "stdlib_paths", lambda: iter(()))
    with pytest.raises(DataError, match="without the source of its library"):
        load_classification("docstrings")
