"""Damage and hostile manifests are noticed."""

import hashlib
import json
import re
import shutil

import pytest

from graphmoe import checkpoint
from graphmoe.errors import CheckpointError


def test_a_flipped_bit_in_any_file_is_noticed(tmp_path, save, tree):
    extras = [lambda folder: (folder / "tokenizer.json").write_text("{}")]
    good, bad = save(tmp_path / "run", 1, extras=extras), save(tmp_path / "run", 2, extras=extras)
    for name in tree(bad):
        run = shutil.copytree(tmp_path / "run", tmp_path / f"copy-{name}")
        data = bytearray((run / bad.name / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / bad.name / name).write_bytes(data)
        damaged = tree(run / bad.name)
        with pytest.warns(UserWarning, match=re.escape(name)) as warned:
            assert checkpoint.latest(run) == run / good.name
        assert len(warned) == 1 and f"{bad.name}/{name}" in str(warned[0].message)
        assert sorted(p.name for p in run.iterdir()) == ["damaged-step-00000002", "step-00000001"]
        assert tree(run / "damaged-step-00000002") == damaged


def test_every_part_of_the_manifest_counts(tmp_path, save):
    step_dir = save(tmp_path, 1)
    path = step_dir / "manifest.json"
    data = path.read_bytes()
    checkpoint.read_manifest(step_dir)
    for place in range(0, len(data) - 1, 4):  # the final newline carries nothing
        changed = bytearray(data)
        changed[place] ^= 1 << place // 4 % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            checkpoint.read_manifest(step_dir)


def rewrite_manifest(step_dir, **values):
    """A manifest that is sound in itself, as someone who hands over a checkpoint can make one."""
    manifest = checkpoint.read_manifest(step_dir) | values
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (step_dir / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "a/../../b", "", ".", "..", "a//b", "./state.json", "a\0b"]
)
def test_manifest_cannot_name_files_outside(tmp_path, save, name):
    step_dir = save(tmp_path, 1)
    rewrite_manifest(step_dir, files=checkpoint.read_manifest(step_dir)["files"] | {name: "0" * 64})
    with pytest.raises(CheckpointError, match=r"manifest\.json: manifest names a file outside"):
        checkpoint.verify(step_dir)


@pytest.mark.parametrize(
    "values, match",
    [
        ({"files": []}, "no table of files"),
        ({"files": {"state.json": 1}}, "no table of files"),
        ({"files": {}}, "lacks a file; expected state.json"),
        ({"step": 2}, "another step; expected 1; got 2"),
    ],
)
def test_manifest_of_another_shape(tmp_path, save, values, match):
    step_dir = save(tmp_path, 1)
    rewrite_manifest(step_dir, **values)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.verify(step_dir)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000, '{"files": {}}', "\ud800"])
def test_malformed_manifest(tmp_path, save, text):
    step_dir = save(tmp_path, 1)
    (step_dir / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(step_dir)


def test_missing_and_unlisted_files(tmp_path, save):
    step_dir = save(tmp_path, 1)
    (step_dir / ".DS_Store").touch()
    checkpoint.verify(step_dir)
    (step_dir / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: file is not in the manifest"):
        checkpoint.verify(step_dir)
    (step_dir / "pytorch_model.bin").unlink()
    (step_dir / "state.json").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"state\.json: file is missing"):
        checkpoint.verify(step_dir)
    (step_dir / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: there is no such file"):
        checkpoint.verify(step_dir)
