"""Training a language model whose experts are sets of edges, and those that it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from graphmoe.models import GraphMoEForCausalLM
from graphmoe.nn import SparseLinear, moe_layers
from graphmoe.nn.sparse import DISTRIBUTIONS
from graphmoe.train.config import flag
from graphmoe.train.loop import Callback, TrainState
from graphmoe.train.rewire import sparse_layers
from recipes.language_model import LanguageModelJob
from recipes.language_model_config import LanguageModelConfig, with_default
from recipes.reporting import say
from recipes.rewire_flags import RewireFlags, block_figures, edge_records
from recipes.study_flags import some_of

NARROW, WIDE, STATIC = ARMS = ("narrow", "wide", "static")
"""Other models: matrices with as many weights as there are edges, matrices of the same width, edges that
stay."""
COMPARED = ("metrics", "params_total", "params_active", "flops_per_token", "seconds")


@dataclass(kw_only=True)
class SparseExpertsConfig(RewireFlags, LanguageModelConfig):
    """Experts five times as wide as those of ``moe_lm``, with a fifth of the edges: as many weights."""

    expert_dim: int = with_default("expert_dim", 640)
    expert_density: float | None = flag(0.2, "edges of an expert, as a share of the places of its matrices")
    expert_distribution: str = flag("uniform", f"how its maps share them: {', '.join(DISTRIBUTIONS)}")
    rewire_every: int = flag(20, "optimiser steps between rewirings")
    beside: list[str] = field(default_factory=list, metadata=some_of(ARMS))

    def __post_init__(self):
        super().__post_init__()
        if self.topology == "dense":
            self.expert_density = None
        share = self.expert_density
        self.require("expert_density", share is None or 0 < share <= 1, "a number > 0 and <= 1")
        known = set(self.beside) <= set(ARMS) and len(set(self.beside)) == len(self.beside)
        self.require("beside", known, f"different ones of {', '.join(ARMS)}")
        if self.is_sparse:
            self.require("parallel", self.parallel == "ddp", "ddp: edges cannot be sharded")
        else:
            self.require("beside", not self.beside, "nothing: there are no edges to compare with")

    @property
    def is_sparse(self) -> bool:
        """Whether the weights of experts are edges."""
        return self.expert_density not in (None, 1)

    def other(self, name: str) -> dict[str, object]:
        """The flags in which another model differs."""
        own = {"beside": [], "sample_tokens": 0}
        if name == STATIC:
            return own | {"topology": "static"}
        width = max(1, round(self.expert_dim * self.expert_density)) if name == NARROW else self.expert_dim
        return own | {"topology": "dense", "expert_dim": width}


class SparseExpertsJob(LanguageModelJob):
    """A language model with sparse experts, and beside it the others that ``--beside`` names."""

    def __init__(self, config: SparseExpertsConfig, recipe: str, **data):
        super().__init__(config, recipe, **data)
        self.rewire = self.config.rewiring(self.model)
        self.edges = self._num_edges()

    def facts(self) -> dict[str, object]:
        return super().facts() | {"topology": self.config.topology}

    def record_figures(self) -> Sequence[Callable]:
        return [*super().record_figures(), block_figures]

    def movers(self) -> list[Callback]:
        return super().movers() + ([] if self.rewire is None else [self.rewire])

    def score(self, state: TrainState) -> dict:
        """As for every language model, and the results of the others, which all processes train."""
        found, data = super().score(state), {"corpus": self.corpus, "thorough": False}
        for name in self.config.beside:
            found[name] = self.train_beside(name, data=data, **self.config.other(name))
        return found

    def conclude(self, state: TrainState) -> dict:
        result = super().conclude(state)
        if self.edges:
            result["edges"] = {"before": self.edges, "after": self._num_edges()}
            result["survival"] = self.records.series["sparse_survival"][-1].tolist()
        others = {name: self.scored[name] for name in self.config.beside if self.scored[name]}
        return result | {name: {key: run[key] for key in COMPARED} for name, run in others.items()}

    def report(self, result: dict) -> None:
        super().report(result)
        rows = {self.config.topology: result} | {name: result[name] for name in self.config.beside}
        for name, row in rows.items():
            loss, speed = row["metrics"]["bits_per_byte"], row["metrics"]["tokens_per_second"]
            cost = f"{row['params_active']:,} active parameters, {row['flops_per_token'] / 1e6:.2f} M FLOPs"
            say(f"{name:>8}: {loss:.4f} bits per byte; a token: {cost}; {speed:,.0f} tokens/s")
        if self.edges:
            left = 100 * sum(result["survival"]) / len(result["survival"])
            counts = "{before:,} at first, {after:,} at the end".format(**result["edges"])
            say(f"edges of experts: {counts}; {left:.0f} % of the first ones are left")

    def _probe(self, whole: GraphMoEForCausalLM) -> dict[str, Tensor]:
        # Pictures of single edges show the first map of one expert of each block.
        return super()._probe(whole) | edge_records(_first_maps(whole))

    def _num_edges(self) -> int:
        return sum(layer.num_edges for layer in sparse_layers(self.model))


def _first_maps(model: nn.Module) -> list[SparseLinear]:
    return [sparse_layers(layer)[0] for layer in moe_layers(model) if sparse_layers(layer)]
