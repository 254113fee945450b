"""Copy sequences of random vectors with a differentiable neural computer, then longer ones in more slots.

``python -m recipes.dnc_copy``
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphmoe.data.algorithmic import CopyTask
from graphmoe.train.config import flag
from recipes.dnc_config import SequenceConfig, with_default
from recipes.frame import main as run
from recipes.sequence_task import SequenceJob


@dataclass(kw_only=True)
class CopyConfig(SequenceConfig):
    """Flags of the copy task."""

    max_steps: int = with_default("max_steps", 750)
    bits: int = flag(8, "bits of a vector")
    more_lengths: list[int] = field(
        default_factory=lambda: [30, 40, 50, 60],
        metadata={"help": "lengths beyond training to score, with --more_slots"},
    )

    def task(self) -> CopyTask:
        return CopyTask(self.bits, self.length)


def main(argv: Sequence[str] | None = None) -> int:
    return run(CopyConfig, argv, recipe="dnc_copy", description=__doc__.splitlines()[0], job=SequenceJob)


if __name__ == "__main__":
    sys.exit(main())
