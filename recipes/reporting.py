"""What language-model recipes say at the end of a run: scores, speed, memory, ghosts."""

import math
import resource
import sys
from pathlib import Path

from graphmoe import checkpoint
from graphmoe.data import Corpus
from graphmoe.train.ranks import launched_rank


def scores(corpus: Corpus, loss: float) -> dict[str, float | None]:
    """A loss in nats per token in the three units people use."""
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": corpus.bits_per_byte(loss)}


def speed(run_dir: Path) -> float:
    """Median training speed of a run, tokens (or what it is counted in) per second."""
    lines = [row for row in checkpoint.read(run_dir).metrics if row["kind"] == "train"]
    rows = [value for row in lines for name, value in row.items() if name.endswith("s_per_second")]
    return sorted(rows)[len(rows) // 2]


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def ghost_steps(run_dir: Path) -> dict[str, list[dict]]:
    """When each ghost began to wake and when it was active, from the run's records.

    Steps are those of the record in which the phase is first seen.
    """
    records = checkpoint.read(run_dir).records
    if "ghost_phase" not in records:
        return {}
    phase, steps = records["ghost_phase"], records["step"]  # [S, L, G], [S]
    rows = []
    for layer in range(phase.shape[1]):
        for ghost in range(phase.shape[2]):
            seen = [steps[phase[:, layer, ghost] >= value] for value in (1, 2)]
            first = [int(found[0]) if len(found) else None for found in seen]
            rows.append({"layer": layer, "ghost": ghost, "activating": first[0], "active": first[1]})
    return {"ghosts": rows}


def report(result: dict) -> None:
    """Print the headline figures of a run, each beside its baseline and its chance level."""
    say(f"{'held-out':>16} {'model':>10} {'unigram':>10} {'chance':>10}")
    for name in ("bits_per_byte", "perplexity", "loss"):
        values = [result[part].get(name) for part in ("metrics", "baseline", "chance")]
        say(f"{name:>16} " + " ".join(f"{'-':>10}" if v is None else f"{v:>10.3f}" for v in values))
    if result["metrics"]["bits_per_byte"] is not None:
        below = 1 - result["metrics"]["bits_per_byte"] / result["baseline"]["bits_per_byte"]
        word = "fewer" if below >= 0 else "MORE"
        say(f"{abs(100 * below):.1f} % {word} bits per byte than the unigram model")
    for row in result.get("ghosts", ()):
        if row["activating"] is not None:
            active = "not yet active" if row["active"] is None else f"active at {row['active']}"
            name = f"layer {row['layer']}, ghost {row['ghost']}"
            say(f"{name}: dormant until step {row['activating']}, then activating, {active}")
    say(
        f"{result['seconds']:.0f} s in all, {result['metrics']['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_rss_mb']:,.0f} MB"
    )
    if result["sample"] is not None:
        say(f"sample: {result['sample']}")


def say(text: str) -> None:
    """Print a line to the terminal; of the processes of one run only the main one does."""
    if launched_rank() == 0:
        print(text, flush=True)
