"""Benchmarks against peers: ``python -m benchmarks [NAME ...] [--rounds N] [--json FILE]``.

Only ratios within one run mean something; nothing here passes or fails.
"""

import argparse
import json
import os
import platform
import sys
from importlib import import_module
from pathlib import Path

import torch

NAMES = (
    "moe_layer",
    "hf_experts",
    "coupling",
    "collaboration",
    "spmm",
    "sparse_mlp",
    "sparse_expert",
    "language_model",
    "dnc",
)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of: {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, of which the median counts")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures into")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    results = {
        name: import_module(f"benchmarks.{name}").run(rounds=args.rounds) for name in args.names or NAMES
    }
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
