"""Any architecture of this family, chosen by one flag: a language model.

``python -m recipes.coupled_lm --architecture_mode gnn``

Each mode has the defaults of its recipe: ``dense_lm``, ``moe_lm``, ``gnn_lm``, ``hgnn_lm``, ``orthogonal_lm``
or ``ghost_lm``. A flag that is given beats the mode, unless it makes another architecture of it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from graphmoe.errors import ConfigError
from graphmoe.train.config import flag
from recipes import language_model
from recipes.dense_lm import DenseConfig
from recipes.ghost_lm import GhostConfig
from recipes.language_model_config import LanguageModelConfig
from recipes.orthogonal_lm import OrthogonalConfig
from recipes.phases import MODES, AloneConfig


def _by_mode(name: str) -> dataclasses.Field:
    field = LanguageModelConfig.__dataclass_fields__[name]
    words = {"help": f"{field.metadata['help']}; the mode decides without it"}
    switch = {"nargs": "?", "const": True} if field.type is bool else {}
    return dataclasses.field(default=None, metadata={**field.metadata, **words, **switch})


@dataclass(kw_only=True)
class CoupledConfig(LanguageModelConfig):
    """Flags of all modes; what a mode decides stands at ``None`` until it does."""

    architecture_mode: Literal["dense", "moe", "alone", "gnn", "hgnn", "orthogonal", "ghost"] = flag(
        "ghost", "dense, plain mixture, or how its experts are coupled; alone is hgnn without any talk"
    )
    expert_dim: int | None = _by_mode("expert_dim")
    num_experts: int | None = _by_mode("num_experts")
    top_k: int | None = _by_mode("top_k")
    coupling: str | None = _by_mode("coupling")
    coupling_norm: bool | None = _by_mode("coupling_norm")
    num_ghosts: int | None = _by_mode("num_ghosts")
    orthogonality_output_coef: float | None = _by_mode("orthogonality_output_coef")
    orthogonality_weight_coef: float | None = _by_mode("orthogonality_weight_coef")
    orthogonality_adaptive: bool | None = _by_mode("orthogonality_adaptive")
    orthogonality_interval: int | None = _by_mode("orthogonality_interval")
    orthogonality_warmup_steps: int | None = _by_mode("orthogonality_warmup_steps")

    def __post_init__(self):
        mode = MODES[self.architecture_mode]
        for field in fields(CoupledConfig):
            if getattr(self, field.name) is None and field.name in mode.__dataclass_fields__:
                setattr(self, field.name, getattr(mode, field.name))
        if mode is AloneConfig:
            self.hyperedges = mode(num_experts=self.num_experts).hyperedges
        super().__post_init__()
        same = {"coupling", "num_experts"} if mode is DenseConfig else {"coupling"}
        same |= set() if mode is GhostConfig else {"num_ghosts"}
        same |= set() if issubclass(mode, OrthogonalConfig | GhostConfig) else {"orthogonality_output_coef"}
        for name in sorted(same):
            if getattr(self, name) != getattr(mode, name):
                what = f"not what --architecture_mode {self.architecture_mode} means"
                raise ConfigError(what, f"--{name}", getattr(mode, name), getattr(self, name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return language_model.main(CoupledConfig, argv, recipe="coupled_lm", description=__doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(main())
