"""A small model to save, and what a folder holds."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from graphmoe import checkpoint


@pytest.fixture
def trained():
    """A model and its optimiser after one step, as the keywords of ``checkpoint.save``."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.fixture
def save(trained):
    """``save(run, step, **options)``: write a checkpoint of the small model."""

    def write(run, step, **options):
        return checkpoint.save(run, step, **trained, **{"state": {"step": step}, **options})

    return write


@pytest.fixture
def tree():
    """``tree(folder)``: names, modes and contents of everything below a folder."""

    def read(folder):
        return {
            path.relative_to(folder).as_posix(): path.is_file()
            and (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(Path(folder).rglob("*"))
        }

    return read
