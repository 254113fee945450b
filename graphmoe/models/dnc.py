"""A differentiable neural computer as a true transformers model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from graphmoe.errors import ConfigError
from graphmoe.models.sequence_prediction import SequencePredictionModel, SequencePredictionOutput
from graphmoe.nn.memory import DNCCell, DNCState


class DNCConfig(PreTrainedConfig):
    """Configuration of :class:`DNCForSequencePrediction`.

    Args:
        input_size: Channels of an input.
        output_size: Bits of an answer.
        hidden_size: Channels ``H`` of the controller.
        num_slots: Slots ``S`` of a sample's memory; no parameter depends on them.
        slot_size: Channels ``W`` of a slot.
        num_read_heads: Read heads ``R``.
        content_bias, write_bias: Where gates start, see :class:`~graphmoe.nn.memory.DNCCell`.

    Raises:
        ConfigError: Something that is less than 1.
    """

    model_type = "graphmoe_dnc"
    keys_to_ignore_at_inference = ("state", "states", "allocates")

    input_size: int = 9
    output_size: int = 8
    hidden_size: int = 64
    num_slots: int = 32
    slot_size: int = 16
    num_read_heads: int = 1
    content_bias: float = 0.0
    write_bias: float = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("input_size", "output_size", "hidden_size", "num_slots", "slot_size", "num_read_heads"):
            if getattr(self, name) < 1:
                raise ConfigError("too small", name, "at least 1", getattr(self, name))


class DNCForSequencePrediction(SequencePredictionModel):
    r"""Bits for each step of a sequence, by a controller with an external memory.

    .. math::
        y_t = W_y h_t + W_r r_t + b

    of the outputs ``h`` and reads ``r`` of a :class:`~graphmoe.nn.memory.DNCCell`. Every sample starts with
    an empty memory of its own, unless the state of an earlier part is passed. ``W_y`` starts at 0, so that
    nothing is answered but what was read: a controller that may answer by itself first learns to do without
    its memory, and stays there for long.

    Args:
        config: Sizes.

    Shapes:
        - **input:** ``input_values [B, T, input_size]``; ``labels [B, T, output_size]`` of 0 and 1, or
          :data:`~graphmoe.models.sequence_prediction.UNSCORED`; ``state``; ``num_slots`` in place of the
          config's.
        - **output:** :class:`~graphmoe.models.sequence_prediction.SequencePredictionOutput`.
    """

    config: DNCConfig

    def __init__(self, config: DNCConfig):
        super().__init__(config)
        self.cell = DNCCell(
            config.input_size,
            config.hidden_size,
            config.num_read_heads,
            config.slot_size,
            config.content_bias,
            config.write_bias,
        )
        self.output = nn.Linear(self.cell.out_channels, config.output_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.output:
            reads = module.in_features - self.config.hidden_size
            weight = torch.zeros_like(module.weight)
            bound = 2 * reads**-0.5
            init.uniform_(weight[:, :reads], -bound, bound)
            init.copy_(module.weight, weight)

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        state: DNCState | None = None,
        num_slots: int | None = None,
        output_states: bool = False,
        **kwargs,
    ) -> SequencePredictionOutput:
        slots = self.config.num_slots if num_slots is None else num_slots
        found = self.cell(input_values, state, slots, return_states=output_states)
        logits = self.output(found[0])
        states, allocates = found[2:] if output_states else (None, None)
        return SequencePredictionOutput(
            loss=self.bit_loss(logits, labels),
            logits=logits,
            state=found[1],
            states=states,
            allocates=allocates,
        )
