from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from graphmoe.typing import MemoryRecord, Record


@dataclass
class GraphMoEModelOutput(ModelOutput):
    """Output of :class:`GraphMoEModel`."""

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    records: tuple[Record, ...] | None = None
    memory_records: tuple[MemoryRecord, ...] | None = None


@dataclass
class GraphMoECausalLMOutput(ModelOutput):
    """Output of :class:`GraphMoEForCausalLM`.

    Attributes:
        loss: ``lm_loss`` plus every auxiliary loss times its coefficient, scalar.
        logits: ``[B, T, vocab_size]``.
        lm_loss: Mean cross-entropy of the next token, nats.
        aux_losses: Unscaled auxiliary losses, averaged over layers, by name.
        router_logits: Router scores of each layer, ``[B * T, E]``.
        records: What each MoE layer did, with ``output_records=True``.
        memory_records: What the memory of each block did, with ``output_records=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    records: tuple[Record, ...] | None = None
    memory_records: tuple[MemoryRecord, ...] | None = None


@dataclass
class GraphMoESequenceClassifierOutput(ModelOutput):
    """Output of :class:`GraphMoEForSequenceClassification`.

    Attributes:
        loss: ``task_loss`` plus every auxiliary loss times its coefficient, scalar.
        logits: ``[B, num_labels]``.
        task_loss: Mean cross-entropy of the labels, nats.
        aux_losses: Unscaled auxiliary losses, averaged over layers, by name.
        hidden_states: What entered the first block and left each, ``[B, T, D]``.
        router_logits: Router scores of each layer, ``[B * T, E]``.
        records: What each MoE layer did, with ``output_records=True``.
        memory_records: What the memory of each block did, with ``output_records=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    records: tuple[Record, ...] | None = None
    memory_records: tuple[MemoryRecord, ...] | None = None
