"""Whole networks; importing this package registers them with transformers' Auto classes."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from graphmoe.checkpoint import latest
from graphmoe.errors import CheckpointError
from graphmoe.models.causal_lm import GraphMoEForCausalLM, GraphMoEModel
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.dnc import DNCConfig, DNCForSequencePrediction
from graphmoe.models.lstm import LSTMConfig, LSTMForSequencePrediction
from graphmoe.models.memory_transformer import MemoryTransformer, PrototypicalNetwork
from graphmoe.models.memory_transformer_configuration import MemoryTransformerConfig
from graphmoe.models.moca import MocaForTokenPrediction, MocaModel
from graphmoe.models.moca_configuration import MocaConfig
from graphmoe.models.moca_text import MocaForSequenceClassification
from graphmoe.models.moca_text_configuration import MocaTextConfig
from graphmoe.models.sequence_classification import GraphMoEForSequenceClassification
from graphmoe.models.sparse_mlp import SparseMLP
from graphmoe.models.sparse_mlp_configuration import SparseMLPConfig

AutoConfig.register("graphmoe", GraphMoEConfig)
AutoModel.register(GraphMoEConfig, GraphMoEModel)
AutoModelForCausalLM.register(GraphMoEConfig, GraphMoEForCausalLM)
AutoModelForSequenceClassification.register(GraphMoEConfig, GraphMoEForSequenceClassification)
AutoConfig.register("graphmoe_memory_transformer", MemoryTransformerConfig)
AutoModel.register(MemoryTransformerConfig, MemoryTransformer)
AutoConfig.register("graphmoe_moca", MocaConfig)
AutoModel.register(MocaConfig, MocaModel)
AutoConfig.register("graphmoe_moca_text", MocaTextConfig)
AutoModelForSequenceClassification.register(MocaTextConfig, MocaForSequenceClassification)
AutoConfig.register("graphmoe_dnc", DNCConfig)
AutoModel.register(DNCConfig, DNCForSequencePrediction)
AutoConfig.register("graphmoe_lstm", LSTMConfig)
AutoModel.register(LSTMConfig, LSTMForSequencePrediction)
AutoConfig.register("graphmoe_sparse_mlp", SparseMLPConfig)
AutoModelForImageClassification.register(SparseMLPConfig, SparseMLP)

__all__ = [
    "DNCConfig",
    "DNCForSequencePrediction",
    "GraphMoEConfig",
    "GraphMoEForCausalLM",
    "GraphMoEForSequenceClassification",
    "GraphMoEModel",
    "LSTMConfig",
    "LSTMForSequencePrediction",
    "MemoryTransformer",
    "MemoryTransformerConfig",
    "MocaConfig",
    "MocaForSequenceClassification",
    "MocaForTokenPrediction",
    "MocaModel",
    "MocaTextConfig",
    "PrototypicalNetwork",
    "SparseMLP",
    "SparseMLPConfig",
    "load",
]

_CLASSES = {
    cls.__name__: cls
    for cls in (
        DNCForSequencePrediction,
        GraphMoEForCausalLM,
        GraphMoEForSequenceClassification,
        LSTMForSequencePrediction,
        MemoryTransformer,
        MocaForSequenceClassification,
        MocaForTokenPrediction,
        PrototypicalNetwork,
        SparseMLP,
        ViTForImageClassification,
    )
}
"""What :func:`load` can build, by the name that stands in ``config.json``."""


def load(path: str | Path) -> PreTrainedModel:
    """The model of a run or of one of its ``step-*`` directories, in eval mode.

    Raises:
        CheckpointError: No such directory, or no undamaged checkpoint in it.
    """
    path = Path(path)
    step = path if (path / "model.safetensors").exists() else latest(path) if path.is_dir() else None
    if step is None:
        raise CheckpointError("no checkpoint here", path, "a run or a step-* directory")
    names = AutoConfig.from_pretrained(step).architectures or ()
    known = [_CLASSES[name] for name in names if name in _CLASSES]
    return (known or [GraphMoEForCausalLM])[0].from_pretrained(step).eval()
