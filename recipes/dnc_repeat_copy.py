"""Say sequences of random vectors several times over with a differentiable neural computer.

``python -m recipes.dnc_repeat_copy``

6 random bits a vector, up to 6 vectors, up to 3 times over, then the mark of the end. Wrong bits of two sets
of sequences after 2,000 steps: 0 of 112,224 with seed 0, 3 of 105,210 with seed 1. An LSTM of equal size got
98.7 % of the bits and 84.0 % of the sequences of seed 0 right after 10,000 steps; chance is 50 % of the bits.
How soon it is learned depends on chance: with batches of 32 and seed 0 88.7 % were right after 1,000 steps.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.data.algorithmic import RepeatCopyTask
from graphmoe.train.config import flag
from recipes.dnc_config import SequenceConfig, with_default
from recipes.frame import main as run
from recipes.sequence_task import SequenceJob


@dataclass(kw_only=True)
class RepeatCopyConfig(SequenceConfig):
    """Flags of the repeat copy task."""

    max_steps: int = with_default("max_steps", 2000)
    batch_size: int = with_default("batch_size", 16)
    length: int = with_default("length", 6)
    curriculum_start: int = with_default("curriculum_start", 2)
    slots: int = with_default("slots", 16)
    bits: int = flag(6, "bits of a vector")
    repeats: int = flag(3, "most repetitions")

    def task(self) -> RepeatCopyTask:
        return RepeatCopyTask(self.bits, self.length, self.repeats)


def main(argv: Sequence[str] | None = None) -> int:
    text = __doc__.splitlines()[0]
    return run(RepeatCopyConfig, argv, recipe="dnc_repeat_copy", description=text, job=SequenceJob)


if __name__ == "__main__":
    sys.exit(main())
