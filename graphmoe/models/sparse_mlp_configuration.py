from itertools import pairwise

from transformers import PreTrainedConfig

from graphmoe.errors import ConfigError
from graphmoe.nn.sparse import allocate_density

ACTIVATIONS = ("relu", "gelu", "silu")


class SparseMLPConfig(PreTrainedConfig):
    r"""Configuration of :class:`SparseMLP`.

    Args:
        input_size: Values of an input, such as pixels times colours.
        hidden_sizes: Neurons of each hidden layer.
        density: Edges, as a share of the weights of a dense network, in (0, 1]; 1 is a dense network.
        distribution: How the layers share them: ``uniform``, ``er`` or ``erk``, see
            :func:`~graphmoe.nn.sparse.density.allocate_density`.
        dense_output: The last layer has all its edges, which count.
        hidden_act: ``relu``, ``gelu`` or ``silu``.
        dropout: Behind each hidden layer, in training.

    Raises:
        ConfigError: Sizes below 1, fewer than two labels, an unknown activation, or a density that the
            layers cannot have.
    """

    model_type = "graphmoe_sparse_mlp"

    input_size: int = 784
    hidden_sizes: tuple[int, ...] | list[int] = (1000, 1000, 1000)
    density: float | int = 0.05
    distribution: str = "uniform"
    dense_output: bool = True
    hidden_act: str = "relu"
    dropout: float | int = 0.2

    def __post_init__(self, **kwargs):
        self.hidden_sizes = list(self.hidden_sizes)
        super().__post_init__(**kwargs)
        for name, sizes in (("input_size", [self.input_size]), ("hidden_sizes", self.hidden_sizes)):
            if not sizes or min(sizes) < 1:
                raise ConfigError("too small", name, "at least 1", getattr(self, name))
        if (self.num_labels or 0) < 2:
            raise ConfigError("nothing to tell apart", "num_labels", "at least 2", self.num_labels)
        if self.hidden_act not in ACTIVATIONS:
            expected = f"one of {', '.join(ACTIVATIONS)}"
            raise ConfigError("unknown activation", "hidden_act", expected, self.hidden_act)
        if not 0 <= self.dropout < 1:
            raise ConfigError("no chance of dropout", "dropout", "from 0 on, below 1", self.dropout)
        self.densities()

    def shapes(self) -> list[tuple[int, int]]:
        """Channels (in, out) of each layer."""
        sizes = [self.input_size, *self.hidden_sizes, self.num_labels]
        return list(pairwise(sizes))

    def densities(self) -> list[float]:
        """Density of each layer."""
        dense = [len(self.hidden_sizes)] if self.dense_output else []
        return allocate_density(self.shapes(), self.density, self.distribution, dense=dense)
