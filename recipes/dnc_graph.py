"""Follow walks through graphs heard as triples, with a differentiable neural computer.

``python -m recipes.dnc_graph``

Up to 8 nodes with random names of 12, one edge each, and walks of 3 steps of which only the first node is
told: each further step needs what was read in the one before. With seeds 0, 1 and 2 99.98, 99.98 and 100 % of
the steps of walks were right after 2,000 training steps, and all in graphs of 8 nodes; of an LSTM of equal
size after 10,000 steps 66.3, 67.1 and 70.3 %, and 37.0 to 44.3 % in graphs of 8 nodes. Chance is 8.3 %.
With two edges a node (``--labels 2 --length 6``) 99.88, 99.98 and 100 %, the LSTM 64.7, 64.5 and 65.7 %.

Reading starts by content and writing with open gates: with even gates seed 1 came to read along links, which
pass nothing on as long as nothing was found by content, and stayed at 53.7 %.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from graphmoe.data.graph_tasks import TraversalTask
from graphmoe.train.config import flag
from recipes.dnc_config import SequenceConfig, with_default
from recipes.frame import main as run
from recipes.sequence_task import SequenceJob


@dataclass(kw_only=True)
class GraphConfig(SequenceConfig):
    """Flags of the traversal task."""

    max_steps: int = with_default("max_steps", 2000)
    length: int = with_default("length", 8)
    curriculum_start: int = with_default("curriculum_start", 2)
    slots: int = with_default("slots", 16)
    slot_size: int = with_default("slot_size", 32)
    content_bias: float = with_default("content_bias", 2.0)
    write_bias: float = with_default("write_bias", 2.0)
    names: int = flag(12, "names that nodes can have")
    labels: int = flag(1, "labels of edges; every node has one edge of each")
    walk: int = flag(3, "steps of a walk")

    def task(self) -> TraversalTask:
        return TraversalTask(self.names, self.labels, self.length, self.walk)


def main(argv: Sequence[str] | None = None) -> int:
    text = __doc__.splitlines()[0]
    return run(GraphConfig, argv, recipe="dnc_graph", description=text, job=SequenceJob)


if __name__ == "__main__":
    sys.exit(main())
