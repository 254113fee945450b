"""Runs that nobody trained, written to disk in the format of real ones."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.numpy import save_file

from graphmoe.checkpoint import read
from graphmoe.metrics import random_coactivation

HOSTILE = "</script><b>bold</b> $\\frac{ $x$"


def write_run(
    path: Path,
    *,
    layers: int = 2,
    primaries: int = 4,
    ghosts: int = 2,
    records: int = 20,
    coupling: str = "hyper",
    strategy: str = "all_pairs",
    size: int = 2,
    measures: bool = True,
    collaboration: bool = True,
    result: bool = True,
) -> Path:
    """Write a run whose ghost 0 wakes in every layer a third of the way through.

    Without ``measures`` it lacks what only runs with specialisation and orthogonality record, without
    ``collaboration`` what only runs with a capacity and experts that collaborate do.
    """
    path.mkdir(parents=True)
    random, experts = np.random.default_rng(0), primaries + ghosts
    step = np.arange(1, records + 1) * 20
    woken = np.clip((np.arange(records) - records / 3) / (records / 4), 0, 1)
    level = np.zeros((records, layers, ghosts), np.float32)
    level[:, :, :1] = woken[:, None, None]
    drift = np.cumsum(random.normal(0, 0.02, (records, layers, experts)), axis=0)
    load = np.exp(drift + random.normal(0, 0.3, (layers, experts)))
    load[:, :, primaries:] *= level
    load /= load.sum(-1, keepdims=True)
    alive = np.concatenate([np.ones((records, layers, primaries)), level], -1) > 0
    tensors = {"step": step.astype(np.int64), "load": load.astype(np.float32)}
    meta = {"recipe": "ghost_lm", "coupling": coupling, "num_experts": str(primaries), "k": "3"}
    meta |= {"num_ghosts": str(ghosts), "ghost_activation_threshold": "0.01", "hyperedge_strategy": strategy}
    if coupling != "none":
        strength = 0.2 + np.cumsum(random.normal(0, 0.002, (records, layers, experts, experts)), axis=0)
        strength *= alive[..., :, None] & alive[..., None, :]
        strength *= 1 - np.eye(experts)
        tensors["coupling"] = strength.astype(np.float32)
    if coupling == "hyper":
        sets = list(combinations(range(experts), size))
        pairs = [(expert, edge) for edge, members in enumerate(sets) for expert in members]
        tensors["incidence"] = np.array(pairs, np.int64).T.copy()
        weight = 0.7 + np.cumsum(random.normal(0, 0.01, (records, layers, len(sets))), axis=0)
        tensors["hyperedge_weight"] = weight.astype(np.float32)
    if ghosts:
        growth = np.exp(random.normal(0, 0.15, (records, layers)))
        tensors["saturation"] = (10 ** np.linspace(-3.5, -1.2, records)[:, None] * growth).astype(np.float32)
        tensors["ghost_level"] = level
        tensors["ghost_phase"] = np.where(level <= 0, 0, np.where(level < 1, 1, 2)).astype(np.int64)
    if measures:
        tensors |= series_of_experts(records, layers, level) | final_measures(layers, alive[-1])
    if collaboration:
        tensors |= series_of_collaboration(records, layers) | final_collaboration(alive[-1])
    save_file(tensors, path / "records.safetensors", metadata=meta)
    lines = []
    for index, at in enumerate(step.tolist()):
        loss = 2.5 + 6 * np.exp(-4 * index / records) + random.normal(0, 0.08)
        aux = {
            "balance": 1 + abs(random.normal(0, 0.1)),
            "router_z": 4.0,
            "orthogonality": 0.02 / (index + 1),
        }
        entry = {
            "kind": "train",
            "step": at,
            "loss": loss + 0.05,
            "lm_loss": loss,
            "aux": aux,
            "dtype": "fp32",
        }
        entry |= {"lr": 1e-3 * (1 - index / records), "grad_norm": 0.9, "seconds": 0.5 * index}
        entry |= {"tokens_per_second": 9000.0 + random.normal(0, 300)}
        lines.append(entry)
        if index % max(records // 5, 1) == 0 or index == records - 1:
            lines.append(
                {
                    "kind": "eval",
                    "step": at,
                    "loss": loss + 0.1,
                    "perplexity": float(np.exp(loss + 0.1)),
                    "bits_per_byte": (loss + 0.1) / 2.3,
                }
            )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(yaml.safe_dump({"run_name": HOSTILE, "learning_rate": 0.001, "k": 3}))
    if result:
        (path / "result.json").write_text(
            json.dumps(
                {
                    "recipe": "ghost_lm",
                    "metrics": {
                        "bits_per_byte": 1.62,
                        "perplexity": 52.5,
                        "loss": 3.961,
                        "tokens_per_second": 9120,
                    },
                    "chance": {"bits_per_byte": 4.12, "perplexity": 4096.0},
                    "baseline": {"name": "unigram", "bits_per_byte": 2.7, "perplexity": 641.0},
                    "seconds": 201.2,
                    "steps": int(step[-1]),
                    "peak_rss_mb": 912.4,
                    "params_total": 1234567,
                    "params_active": 934567,
                    "seed": 0,
                    "dataset": "stdlib",
                    "device": "cpu",
                    "versions": {"python": "3.11", "torch": "2.13.0"},
                    "sample": {"prompt": "def main():\n", "continuation": "    return '</pre><i>'"},
                }
            )
        )
    return path


def series_of_experts(records: int, layers: int, level: np.ndarray) -> dict[str, np.ndarray]:
    """Specialisation, entropy, orthogonality and the rates of the ghosts, over ``records`` steps."""
    random, time = np.random.default_rng(1), np.linspace(0, 1, records)[:, None]
    noise = random.normal(0, 0.02, (records, layers))
    base = 0.1 * 0.8 ** np.arange(layers)
    series = {
        "specialisation": 0.75 - 0.6 * np.exp(-4 * time) + noise,
        "routing_entropy": 2.0 - 0.9 * time + noise,
        "overlap": 0.05 + 0.5 * np.exp(-5 * time - 0.2 * np.arange(layers)) + 0.2 * np.abs(noise),
        "orthogonality_strength": np.clip(base * np.where(time < 0.4, 1.5, 0.7) * (1.001 - time), 1e-3, 0.3),
    }
    if level.size:
        series["ghost_learning_rate"] = 1e-3 * time[..., None] * level
    return {key: value.astype(np.float32) for key, value in series.items()}


def final_measures(layers: int, alive: np.ndarray) -> dict[str, np.ndarray]:
    """What is measured once after training; ``alive [L, E]``."""
    random, experts = np.random.default_rng(2), alive.shape[1]
    cka = 0.2 + 0.5 * random.random((layers, experts, experts))
    cka = np.where(np.eye(experts, dtype=bool), 1, (cka + cka.swapaxes(1, 2)) / 2)
    measures = {
        "cka": np.where(alive[:, :, None] & alive[:, None], cka, np.nan),
        "cka_random": np.full(layers, 0.034),
        "specialisation": np.linspace(0.68, 0.75, layers),
        "specialisation_random": np.full(layers, 0.83),
        "routing_entropy": np.linspace(1.4, 1.1, layers),
        "routing_entropy_random": np.log2(alive.sum(1)),
        "mutual_information": np.linspace(0.3, 0.55, layers),
        "mutual_information_random": np.full(layers, 0.06),
    }
    return {f"final_{name}": value.astype(np.float32) for name, value in measures.items()}


def series_of_collaboration(records: int, layers: int) -> dict[str, np.ndarray]:
    """Dropped edges and the mediator's gate, over ``records`` steps."""
    random, time = np.random.default_rng(3), np.linspace(0, 1, records)[:, None]
    noise = np.abs(random.normal(0, 0.01, (records, layers)))
    series = {
        "drop_rate": 0.03 + 0.25 * np.exp(-4 * time - 0.2 * np.arange(layers)) + noise,
        "drop_rate_random": np.full((records, layers), 0.015),
        "mediator_gate": 0.5 - 0.3 * time * np.linspace(-0.5, 1, layers) + noise,
        "mediator_gate_std": 0.02 + 0.1 * time + noise,
    }
    return {key: value.astype(np.float32) for key, value in series.items()}


def final_collaboration(alive: np.ndarray) -> dict[str, np.ndarray]:
    """What collaborating experts do after training, with a mediator; ``alive [L, E]``."""
    random, (layers, experts) = np.random.default_rng(4), alive.shape
    together, chance, attention = [], [], []
    for awake in alive:
        # Tokens with two experts each, some of which like to be chosen together.
        taste = random.normal(0, 1, (4, experts))[random.integers(0, 4, 500)]
        scores = np.where(awake, taste + random.gumbel(0, 0.7, (500, experts)), -np.inf)
        serves = (scores >= np.sort(scores)[:, -2:-1]).astype(float)
        together.append(serves.T @ serves / len(serves))
        chance.append(random_coactivation(torch.from_numpy(together[-1].diagonal().copy())).numpy())
        heard = 1 / 3 + 0.08 * random.normal(0, 1, (experts + 1, experts + 1))
        met = np.pad(together[-1] > 0, (0, 1), constant_values=True)
        met[:-1, -1] = met[-1, :-1] = awake
        attention.append(np.where(met, heard.clip(0.02), np.nan))
    figures = {
        "coactivation": together,
        "coactivation_random": chance,
        "attention": attention,
        "attention_uniform": np.full(layers, 1 / 3),
        "mediator_gate": np.linspace(0.6, 0.25, layers),
        "mediator_gate_std": np.linspace(0.05, 0.15, layers),
        "inference_loss": 4 + np.array([[0.09, 0.03, 0.0, 0.012], [0.2, 0.1, 0.06, 0.08]]),
        "inference_error": np.array([[0.004, 0.002, 0.0, 0.001], [0.01, 0.005, 0.004, 0.003]]),
    }
    counts = {"steps": [1, 2], "rounds": [0, 1, 2, 4], "trained": [1, 2]}
    return {f"final_{name}": np.asarray(value, np.float32) for name, value in figures.items()} | {
        f"final_inference_{name}": np.array(value, np.int64) for name, value in counts.items()
    }


def change(run: Path, meta: dict[str, str] | None = None, **changes: np.ndarray | None) -> Path:
    """Replace (or, with ``None``, remove) records of a run and entries of their metadata."""
    record = read(run)
    tensors = {key: value for key, value in (record.records | changes).items() if value is not None}
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, run / "records.safetensors", metadata=record.meta | (meta or {}))
    return run


def texts(figure: Figure) -> list[str]:
    """Every text of a figure, after it was drawn."""
    figure.draw_without_rendering()
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return [text.get_text() for text in found if text.get_text()]


def cells(figure: Figure) -> list[np.ndarray]:
    """The values of every heatmap of a figure, NaN where a cell is empty."""
    images = [image for ax in figure.axes for image in ax.get_images()]
    return [image.get_array().filled(np.nan) for image in images]


def write_arm(
    path: Path, *, seed: int = 0, bits: float | None = 1.9, mode: str | None = "moe", **config
) -> Path:
    """Write a finished run as a comparison reads it: config, curve of evaluations, result.

    Without ``bits`` the corpus has no bytes, and the loss is 4.
    """
    path.mkdir(parents=True)
    settings = {"recipe": "coupled_lm", "learning_rate": 2e-3, "seed": seed, "run_name": path.name}
    settings |= {"architecture_mode": mode} | config
    (path / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    last = 4.0 if bits is None else 2.3 * bits
    scores = {"loss": last, "perplexity": float(np.exp(last)), "bits_per_byte": bits}
    lines = [
        {"kind": "eval", "step": step}
        | {key: None if value is None else value * (1 + 40 / step) for key, value in scores.items()}
        for step in (40, 80, 120, 160, 200)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = {"specialisation": [0.5, 0.7], "specialisation_random": [0.8, 0.8]}
    measured |= {"cka": [0.3, 0.1], "cka_random": [0.05, 0.05], "max_violation": [0.4, 0.2]}
    result = {
        "recipe": "coupled_lm",
        "metrics": scores | {"tokens_per_second": 9000.0 + seed},
        "baseline": {"name": "unigram", "loss": 6.2, "perplexity": 493.0, "bits_per_byte": bits and 2.7},
        "chance": {"loss": 8.3, "perplexity": 4096.0, "bits_per_byte": bits and 4.1},
        "params_total": 1_234_567,
        "params_active": 934_567,
        "flops_per_token": 3_210_000,
        "experts": measured | {"load_entropy": [0.9, 0.98]},
        "dataset": config.get("dataset", "stdlib"),
        "seed": seed,
    }
    (path / "result.json").write_text(json.dumps(result))
    return path
