"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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


def test_every_command_exists():
    make = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)):
        assert re.search(rf"^{target}:", make, re.M), target
    for module in set(re.findall(r"python -m ((?:recipes|analysis)[.\w]*)", README)):
        path = Path(__file__).parents[1] / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_flags_exist(capsys):
    from recipes import ghost_lm

    with pytest.raises(SystemExit):
        ghost_lm.main(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    table = README.split("### Flags")[1].split("### A run on disk")[0]
    assert set(re.findall(r"--[a-z_]+", table)) <= known
