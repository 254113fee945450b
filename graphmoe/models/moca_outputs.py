"""What goes into and comes out of the networks of slots and experts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from graphmoe.typing import MemoryState, MocaRecord, Record


class MocaState(NamedTuple):
    """Where sequences stand after some tokens; going on from it is one long sequence.

    Attributes:
        memory: Of each layer, ``None`` without slots.
        position: Tokens since the last delimiter, ``[B]`` int64.
        phase: Delimiters so far, ``[B]`` int64.
    """

    memory: tuple[MemoryState | None, ...]
    position: Tensor
    phase: Tensor


class Present(NamedTuple):
    """The tokens of a batch that are no padding, those of one sequence after another.

    Attributes:
        place: Where each stands in the flattened batch, ``[N]``, or ``None`` where all are present.
        sequence: Sequence of each, ``[N]``.
        phase: Delimiters before each, ``[N]``.
        shape: ``(B, T)``.
    """

    place: Tensor | None
    sequence: Tensor
    phase: Tensor
    shape: torch.Size

    def take(self, values: Tensor) -> Tensor:
        """Those of ``values [B, T]``, ``[N]``."""
        values = values.flatten()
        return values if self.place is None else values.index_select(0, self.place)

    def spread(self, values: Tensor) -> Tensor:
        """Put ``values [N, C]`` where they belong, ``[B, T, C]``; 0 for padding."""
        if self.place is not None:
            values = values.new_zeros(self.shape.numel(), values.size(1)).index_copy(0, self.place, values)
        return values.view(*self.shape, values.size(1))


@dataclass
class MocaModelOutput(ModelOutput):
    """Output of :class:`MocaModel`.

    Attributes:
        last_hidden_state: ``[B, T, D]``.
        state: Where the sequences stand.
        layer_records: What each layer did; its tokens are those present.
        present: Where those tokens stand; what :meth:`MocaForTokenPrediction.aux_losses` wants to know.
    """

    last_hidden_state: Tensor | None = None
    state: MocaState | None = None
    layer_records: tuple[MocaRecord, ...] | None = None
    present: Present | None = None


@dataclass
class MocaOutput(ModelOutput):
    """Output of :class:`MocaForTokenPrediction`.

    Attributes:
        loss: ``task_loss`` plus every auxiliary loss times its coefficient, scalar.
        logits: ``[B, T, vocab_size]``.
        task_loss: Mean cross-entropy of the labels, nats.
        aux_losses: Unscaled auxiliary losses, averaged over layers, by name.
        state: Where the sequences stand.
        records: What the experts of each layer did, with ``output_records=True``.
        layer_records: What each layer did, with ``output_records=True``; its tokens are those present, those
            of one sequence after another.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    state: MocaState | None = None
    records: tuple[Record, ...] | None = None
    layer_records: tuple[MocaRecord, ...] | None = None
