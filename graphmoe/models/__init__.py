"""Whole networks; importing this package registers them with transformers' Auto classes."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from graphmoe.checkpoint import latest
from graphmoe.errors import CheckpointError
from graphmoe.models.causal_lm import GraphMoEForCausalLM, GraphMoEModel
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.sequence_classification import GraphMoEForSequenceClassification

AutoConfig.register("graphmoe", GraphMoEConfig)
AutoModel.register(GraphMoEConfig, GraphMoEModel)
AutoModelForCausalLM.register(GraphMoEConfig, GraphMoEForCausalLM)
AutoModelForSequenceClassification.register(GraphMoEConfig, GraphMoEForSequenceClassification)

__all__ = [
    "GraphMoEConfig",
    "GraphMoEForCausalLM",
    "GraphMoEForSequenceClassification",
    "GraphMoEModel",
    "load",
]


def load(path: str | Path) -> PreTrainedModel:
    """The model of a run or of one of its ``step-*`` directories, in eval mode.

    Raises:
        CheckpointError: No such directory, or no undamaged checkpoint in it.
    """
    path = Path(path)
    step = path if (path / "model.safetensors").exists() else latest(path) if path.is_dir() else None
    if step is None:
        raise CheckpointError("no checkpoint here", path, "a run or a step-* directory")
    classifies = GraphMoEForSequenceClassification.__name__ in (
        AutoConfig.from_pretrained(step).architectures or ()
    )
    head = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    return head.from_pretrained(step).eval()
