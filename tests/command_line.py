"""Recipes from the outside, small enough for a test."""

import importlib
import sys
from pathlib import Path

from graphmoe import checkpoint

ROOT = Path(__file__).parents[1]
SMALL = [
    *(
        "--tokenizer=bytes",
        "--seq_len=32",
        "--batch_size=4",
        "--embed_dim=16",
        "--num_layers=2",
        "--num_heads=2",
    ),
    *("--expert_dim=16", "--eval_windows=4", "--warmup_steps=2", "--log_every=2", "--num_threads=1"),
    *("--device=cpu", "--sample_tokens=8"),
]
GHOSTS = ["--ghost_window=3", "--ghost_rate=0.34"]


def command(recipe: str, *flags: object) -> list[str]:
    return [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)]


def run(recipe: str, *flags: object) -> int:
    """Run a recipe in this process, which saves the seconds of importing torch; its exit code."""
    return importlib.import_module(f"recipes.{recipe}").main([str(flag) for flag in flags])


def losses(run_dir: Path) -> dict[int, str]:
    rows = checkpoint.read(run_dir).metrics
    return {row["step"]: float.hex(row["loss"]) for row in rows if row["kind"] == "train"}
