"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def test_layer_inside_a_gnn():
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "KarateClub" in b)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["x"].shape == (34, 4)
    data, layers = names["data"], [names[n] for n in ("conv", "moe", "out")]
    optimizer = torch.optim.Adam([p for m in layers for p in m.parameters()], lr=0.01)
    for _ in range(60):
        hidden = names["moe"](names["conv"](data.x, data.edge_index).relu())
        loss = torch.nn.functional.cross_entropy(names["out"](hidden, data.edge_index), data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # chance is log 4 = 1.39


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_and_link_exists(path):
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[path], re.M)):
        assert re.search(rf"^{target}:", make, re.M), target
    for module in set(re.findall(r"python -m ((?:recipes|analysis|benchmarks|examples)[.\w]*)", PAGES[path])):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[path]):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_imports_of_examples_work(path):
    for block in re.findall(r"```python\n(.*?)```", PAGES[path], re.S):
        lines = [line for line in block.splitlines() if re.match(r"(from|import) ", line)]
        exec(compile("\n".join(lines), path.name, "exec"), {})


def test_flags_exist(capsys):
    from recipes import ghost_lm

    with pytest.raises(SystemExit):
        ghost_lm.main(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    table = README.split("### Flags")[1].split("### A run on disk")[0]
    assert set(re.findall(r"--[a-z_]+", table)) <= known
