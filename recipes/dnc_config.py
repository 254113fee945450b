"""The flags of every recipe that trains a differentiable neural computer, its models and its tasks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from transformers import PreTrainedModel

from graphmoe.data.algorithmic import BitTask
from graphmoe.errors import ConfigError
from graphmoe.models import DNCConfig, DNCForSequencePrediction, LSTMForSequencePrediction
from graphmoe.models.lstm import lstm_of_size
from graphmoe.train.config import RunConfig, flag
from graphmoe.train.config import with_default as any_with_default

BASELINE = "lstm"
"""Model of the baseline, and the folder of its run inside that of the computer."""


@dataclass(kw_only=True)
class SequenceConfig(RunConfig):
    """Flags that all tasks share; a recipe overrides defaults and says what its task is."""

    max_steps: int = flag(1000, "optimiser steps to train for")
    batch_size: int = flag(32, "sequences in a batch, in all processes together")
    learning_rate: float = flag(1e-2, "peak learning rate")
    weight_decay: float = flag(0.0, "decoupled weight decay, a step and unit of learning rate")
    adam_beta2: float = flag(0.999, "decay of AdamW's mean of squared gradients", aliases=["--beta2"])
    min_lr_ratio: float = flag(0.05, "last learning rate as a fraction of the peak")
    lr_scheduler_type: str = flag(
        "warmup_stable_decay", "learning-rate schedule, a name that transformers knows"
    )
    max_grad_norm: float = flag(
        10.0, "largest norm of all gradients together; inf does not clip", aliases=["--grad_clip"]
    )
    eval_every: int = flag(250, "optimiser steps between scores")
    save_every: int = flag(250, "optimiser steps between checkpoints", aliases=["--save_interval"])
    log_every: int = flag(25, "optimiser steps between lines of metrics", aliases=["--log_interval"])
    dataset: str = flag("drawn", "sequences are drawn, never read")
    model: Literal["dnc", "lstm"] = flag("dnc", "the computer, or the LSTM without a memory")
    hidden_size: int = flag(64, "channels of the controller")
    slots: int = flag(32, "slots of a memory; no parameter depends on them", aliases=["--num_slots"])
    slot_size: int = flag(16, "channels of a slot")
    heads: int = flag(1, "read heads")
    content_bias: float = flag(0.0, "start of the bias of reading by content, against reading along links")
    write_bias: float = flag(0.0, "start of the biases of the gates that write and that allocate")
    length: int = flag(20, "largest difficulty in training: vectors, items or nodes")
    curriculum_start: int = flag(4, "largest difficulty at the first step")
    curriculum_steps: int = flag(300, "optimiser steps until the largest difficulty; 0 for all at once")
    eval_sequences: int = flag(1000, "sequences of each of the two final sets")
    baseline_steps: int = flag(10_000, "optimiser steps of an LSTM of equal size; 0 for no baseline")
    more_lengths: list[int] = field(
        default_factory=list, metadata={"help": "difficulties beyond training to score, with --more_slots"}
    )
    more_slots: int = flag(64, "slots for difficulties beyond training")

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden_size", "slots", "slot_size", "heads", "eval_sequences", "more_slots"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        for name in ("curriculum_start", "curriculum_steps", "baseline_steps"):
            self.require(name, getattr(self, name) >= 0, "a number >= 0")
        self.require("parallel", self.parallel == "ddp", "ddp: a model this small is not divided")
        task = self.task()  # says now what it cannot draw
        self.require_room(task, self.length, self.slots, "--length")
        for length in self.beyond():
            self.require_room(task, length, self.more_slots, "--more_lengths")

    @staticmethod
    def require_room(task: BitTask, length: int, slots: int, name: str) -> None:
        """Refuse a difficulty that more has to be held of than there are slots.

        Raises:
            ConfigError: Too few slots.
        """
        if task.slots(length) > slots:
            what = f"{task.slots(length)} vectors have to be held at once, and there are {slots} slots"
            raise ConfigError(what, name, "less, or more slots", length)

    def task(self) -> BitTask:
        """What is to be learned."""
        raise NotImplementedError

    def beyond(self) -> list[int]:
        """Difficulties to score above those of training."""
        return [length for length in self.more_lengths if length > self.length]

    def longest(self, step: int) -> int:
        """Largest difficulty at an optimiser step: the curriculum."""
        first = min(self.curriculum_start, self.length)
        if not self.curriculum_steps:
            return self.length
        return int(first + (self.length - first) * min(1.0, step / self.curriculum_steps))

    def build(self) -> PreTrainedModel:
        """The model, or an LSTM with about as many parameters."""
        task = self.task()
        computer = DNCConfig(
            input_size=task.input_size,
            output_size=task.output_size,
            hidden_size=self.hidden_size,
            num_slots=self.slots,
            slot_size=self.slot_size,
            num_read_heads=self.heads,
            content_bias=self.content_bias,
            write_bias=self.write_bias,
        )
        model = DNCForSequencePrediction(computer)
        if self.model == "dnc":
            return model
        size = sum(parameter.numel() for parameter in model.parameters())
        return LSTMForSequencePrediction(lstm_of_size(task.input_size, task.output_size, size))


with_default = partial(any_with_default, SequenceConfig)
"""The flag of this name with another default."""
