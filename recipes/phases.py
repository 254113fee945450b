"""The architectures that ``coupled_lm`` chooses from and ``compare_phases`` compares, by name."""

from dataclasses import dataclass

from recipes.dense_lm import DenseConfig
from recipes.ghost_lm import GhostConfig
from recipes.gnn_lm import GnnConfig
from recipes.hgnn_lm import HgnnConfig
from recipes.language_model_config import LanguageModelConfig
from recipes.orthogonal_lm import OrthogonalConfig


@dataclass(kw_only=True)
class AloneConfig(HgnnConfig):
    """The control of coupling: the maps and the arithmetic of ``hgnn``, but nobody talks to anybody.

    Every expert is the only member of a hyperedge of its own.
    """

    def __post_init__(self):
        self.hyperedges = ";".join(str(expert) for expert in range(self.num_experts))
        super().__post_init__()


MODES = {
    "dense": DenseConfig,
    "moe": LanguageModelConfig,
    "alone": AloneConfig,
    "gnn": GnnConfig,
    "hgnn": HgnnConfig,
    "orthogonal": OrthogonalConfig,
    "ghost": GhostConfig,
}
