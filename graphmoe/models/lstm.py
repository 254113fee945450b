"""An LSTM without external memory: the baseline of the differentiable neural computer."""

from torch import Tensor, nn
from transformers import PreTrainedConfig

from graphmoe.errors import ConfigError
from graphmoe.models.sequence_prediction import SequencePredictionModel, SequencePredictionOutput


class LSTMConfig(PreTrainedConfig):
    """Configuration of :class:`LSTMForSequencePrediction`.

    Args:
        input_size: Channels of an input.
        output_size: Bits of an answer.
        hidden_size: Channels ``H`` of a layer.
        num_hidden_layers: Layers.

    Raises:
        ConfigError: Something that is less than 1.
    """

    model_type = "graphmoe_lstm"
    keys_to_ignore_at_inference = ("state",)

    input_size: int = 9
    output_size: int = 8
    hidden_size: int = 80
    num_hidden_layers: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("input_size", "output_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ConfigError("too small", name, "at least 1", getattr(self, name))


class LSTMForSequencePrediction(SequencePredictionModel):
    """Bits for each step of a sequence, by an LSTM alone.

    Args:
        config: Sizes.

    Shapes:
        - **input:** ``input_values [B, T, input_size]``; ``labels [B, T, output_size]`` of 0 and 1, or
          :data:`~graphmoe.models.sequence_prediction.UNSCORED`; ``state``, output and cell ``[L, B, H]``.
        - **output:** :class:`~graphmoe.models.sequence_prediction.SequencePredictionOutput`.
    """

    config: LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.lstm = nn.LSTM(config.input_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> SequencePredictionOutput:
        outputs, state = self.lstm(input_values, state)
        logits = self.output(outputs)
        return SequencePredictionOutput(loss=self.bit_loss(logits, labels), logits=logits, state=state)


def lstm_of_size(input_size: int, output_size: int, parameters: int) -> LSTMConfig:
    """The LSTM of one layer whose number of parameters is closest to ``parameters``."""

    def count(hidden: int) -> int:
        return 4 * hidden * (input_size + hidden + 2) + (hidden + 1) * output_size

    hidden = 1
    while count(hidden + 1) <= parameters:
        hidden += 1
    if abs(count(hidden + 1) - parameters) < abs(count(hidden) - parameters):
        hidden += 1
    return LSTMConfig(input_size=input_size, output_size=output_size, hidden_size=hidden)
