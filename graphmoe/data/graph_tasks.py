"""Random graphs told as triples, and walks through them to be followed: drawn from (seed, index)."""

import numpy as np

from graphmoe.data.algorithmic import UNSCORED, BitBatch, BitTask
from graphmoe.errors import ConfigError


class TraversalTask(BitTask):
    """Hear the edges of a graph in random order, then follow a walk of which only the labels are told.

    As in "Hybrid computing using a neural network with dynamic external memory" (Graves et al., 2016), at a
    smaller size: an edge is a triple (source, label, target) of one-hot names. Nodes get random names in each
    graph, so that nothing but the memory can know where an edge leads. The walk begins with a node and a
    label; all further steps give a label alone. Asked for is where each step leads.

    Args:
        num_names: Names that nodes can have.
        num_labels: Labels of edges; every node has one edge of each.
        longest: Most nodes of a graph.
        walk: Steps of a walk.

    Attributes:
        chance: Share of steps that a guess among all names gets right.

    Raises:
        ConfigError: More nodes than names, or nothing to follow.
    """

    name = "graph"
    answers = "steps of walks"
    shortest = 2

    def __init__(self, num_names: int, num_labels: int, longest: int, walk: int):
        super().__init__(num_names, longest)
        if num_names < longest:
            raise ConfigError("more nodes than names", "--names", f"at least {longest}", num_names)
        if num_labels < 1:
            raise ConfigError("a graph without edges", "--labels", "at least 1", num_labels)
        if walk < 1:
            raise ConfigError("nothing to follow", "--walk", "at least 1", walk)
        self.num_labels, self.walk = num_labels, walk
        self.input_size, self.output_size = 2 * num_names + num_labels + 1, num_names
        self.chance = 1 / num_names

    def slots(self, length: int) -> int:
        return length * self.num_labels

    def draw(self, rng: np.random.Generator, size: int, length: int) -> BitBatch:
        edges, names, labels = length * self.num_labels, self.bits, self.num_labels
        row = np.arange(size)
        name = np.argsort(rng.random((size, names)), axis=1)[:, :length]  # of each node
        target = rng.integers(0, length - 1, (size, length, labels))
        target += target >= np.arange(length)[:, None]  # no edge leads back to its own node
        order = np.argsort(rng.random((size, edges)), axis=1)
        inputs = np.zeros((size, edges + self.walk, self.input_size), np.float32)
        answers = np.full((size, edges + self.walk, names), UNSCORED, np.float32)
        for step in range(edges):
            source, label = np.divmod(order[:, step], labels)
            inputs[row, step, name[row, source]] = 1
            inputs[row, step, names + label] = 1
            inputs[row, step, names + labels + name[row, target[row, source, label]]] = 1
        node = rng.integers(0, length, size)
        inputs[row, edges, name[row, node]] = 1
        for step in range(edges, edges + self.walk):
            label = rng.integers(0, labels, size)
            inputs[row, step, names + label] = 1
            inputs[:, step, -1] = 1
            node = target[row, node, label]
            answers[:, step] = 0
            answers[row, step, name[row, node]] = 1
        return BitBatch(inputs, answers)

    def wrong(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which steps of walks are wrong: the answer is the name with the largest logit."""
        return (logits.argmax(axis=-1) != labels.argmax(axis=-1))[labels[..., 0] != UNSCORED]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, num_labels={self.num_labels}, walk={self.walk})"
