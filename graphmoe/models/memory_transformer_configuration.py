from transformers import PreTrainedConfig

from graphmoe.errors import ConfigError

ENCODERS = ("conv", "patch")
SMALLEST_IMAGE = 16
"""Height and width from which something is left after four poolings."""


class MemoryTransformerConfig(PreTrainedConfig):
    r"""Configuration of :class:`MemoryTransformer` and of its baseline :class:`PrototypicalNetwork`.

    Args:
        image_size: Height and width of an image.
        num_channels: Channels of an image.
        encoder: ``conv``, four convolutions with batch norm; or ``patch``, a transformer over patches.
        hidden_size: Channels of an embedding, and of the key of a slot.
        encoder_channels: Channels inside the encoder. Default: 64 of ``conv``, 256 of ``patch``.
        patch_size: Height and width of a patch; divides ``image_size``.
        num_hidden_layers: Blocks of ``patch``.
        num_attention_heads: Attention heads of ``patch``; divides its channels.
        num_slots: Slots of the memory of an episode: the most examples that it can hold.
        max_ways: Labels that an episode can have.
        initializer_range: Standard deviation of initial weights of ``patch``.

    Raises:
        ConfigError: Sizes that do not fit one another, or an unknown encoder.
    """

    model_type = "graphmoe_memory_transformer"
    keys_to_ignore_at_inference = ("attention", "task_loss")

    image_size: int = 28
    num_channels: int = 1
    encoder: str = "conv"
    hidden_size: int = 64
    encoder_channels: int | None = None
    patch_size: int = 4
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_slots: int = 500
    max_ways: int = 64
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.encoder_channels is None:
            self.encoder_channels = 256 if self.encoder == "patch" else 64
        super().__post_init__(**kwargs)
        if self.encoder not in ENCODERS:
            raise ConfigError("unknown encoder", "encoder", f"one of {', '.join(ENCODERS)}", self.encoder)
        least = {"image_size": SMALLEST_IMAGE if self.encoder == "conv" else 1, "max_ways": 2}
        names = ("num_channels", "hidden_size", "encoder_channels", "patch_size", "num_hidden_layers")
        for name in (*least, *names, "num_attention_heads", "num_slots"):
            if getattr(self, name) < least.get(name, 1):
                raise ConfigError("too small", name, f"at least {least.get(name, 1)}", getattr(self, name))
        if self.encoder == "patch":
            for name, whole in (("patch_size", "image_size"), ("num_attention_heads", "encoder_channels")):
                total, part = getattr(self, whole), getattr(self, name)
                if total % part:
                    raise ConfigError(f"does not divide {whole}", name, f"a divisor of {total}", part)
