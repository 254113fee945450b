"""What models of binary sequences share: their output, their loss and how their weights start."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from graphmoe.nn.memory import DNCCell

UNSCORED = -100.0
"""Label of what is not asked for."""


@dataclass
class SequencePredictionOutput(ModelOutput):
    """Output of a model of binary sequences.

    Attributes:
        loss: Mean binary cross-entropy of the scored labels, nats, scalar.
        logits: ``[B, T, output_size]``.
        state: What the model knows after the last step; pass it on to continue the sequence.
        states: With ``output_states=True``, the state after each step.
        allocates: With ``output_states=True``, how far each step allocates a new slot, ``[T, B, 1]``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: tuple[Tensor, ...] | None = None
    states: list[tuple[Tensor, ...]] | None = None
    allocates: Tensor | None = None


class SequencePredictionModel(PreTrainedModel):
    """Base of models that answer a sequence of vectors with a sequence of bits."""

    main_input_name = "input_values"

    @staticmethod
    def bit_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
        """Mean binary cross-entropy of the ``labels [B, T, O]`` that are not :data:`UNSCORED`; 0 without."""
        if labels is None:
            return None
        scored = labels != UNSCORED
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        truth = labels.to(logits.dtype).clamp(min=0)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return (losses * scored).sum() / scored.sum().clamp(min=1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                bound = module.hidden_size**-0.5
                init.uniform_(parameter, -bound, bound)
                if name.startswith("bias"):
                    init.copy_(parameter, _remembering(parameter, module.hidden_size, name))
        elif isinstance(module, DNCCell):
            for lin, bound in module.bounds():
                init.uniform_(lin.weight, -bound, bound)
            init.copy_(module.lin_input.bias, _remembering(module.lin_input.bias, module.hidden_channels))
            init.copy_(module.lin_interface.bias, module.interface_start())

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips modules without tensors of their own, such as a cell.
        super()._initialize_weights(module, is_custom_code=False)


def _remembering(bias: Tensor, width: int, name: str = "") -> Tensor:
    """A bias of 0 but for the forget gate of one of an LSTM's two, 1."""
    start = torch.zeros_like(bias)
    if "bias_hh" not in name:
        start[width : 2 * width] = 1
    return start
