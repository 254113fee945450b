"""Few-shot classification by a memory that lasts one episode, and the prototypical network beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from graphmoe.errors import DataError
from graphmoe.models.image_encoder import ConvEncoder, PatchEncoder
from graphmoe.models.memory_transformer_configuration import MemoryTransformerConfig
from graphmoe.nn import AttendConv, FeedForward, RMSNorm
from graphmoe.nn.episode_memory import EpisodeMemory, EpisodeState
from graphmoe.typing import NEVER


@dataclass
class FewShotOutput(ModelOutput):
    """Output of a few-shot classifier.

    Attributes:
        loss: Mean cross-entropy of the labels of queries, nats.
        logits: ``[B, Q, max_ways]``: log probabilities of the memory, or minus distances to prototypes; very
            small for a label that the episode does not have.
        task_loss: ``loss``, by the name that training logs.
        attention: Slots that each query read, ``[B, Q, S]``, with ``output_attention=True``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    attention: Tensor | None = None


class FewShotModel(PreTrainedModel):
    """What both classifiers share: the encoder, the loss, and that an episode is all they look at.

    Where no ``query_images`` are given, every example is told by the others of its episode.

    Args:
        config: The sizes.

    Shapes:
        - **input:** ``support_images [B, P, channels, height, width]`` in [0, 1], ``support_labels [B, P]``
          in ``[0, max_ways)``, and maybe ``query_images [B, Q, channels, height, width]`` and their
          ``labels [B, Q]``.
        - **output:** :class:`FewShotOutput`.

    Raises:
        DataError: Images of another size.
        ConfigError: See :class:`~graphmoe.nn.episode_memory.EpisodeMemory`.
    """

    config: MemoryTransformerConfig
    config_class = MemoryTransformerConfig
    main_input_name = "support_images"

    def __init__(self, config: MemoryTransformerConfig):
        super().__init__(config)
        sizes = (config.num_channels, config.image_size)
        if config.encoder == "conv":
            self.encoder = ConvEncoder(*sizes, config.encoder_channels, config.hidden_size)
        else:
            self.encoder = PatchEncoder(
                *sizes, config.patch_size, config.encoder_channels, config.hidden_size,
                num_layers=config.num_hidden_layers, heads=config.num_attention_heads,
            )  # fmt: skip
        self.build_head()
        self.post_init()

    def build_head(self) -> None:
        """Make what comes behind the encoder."""

    def tell(
        self, support: Tensor, support_labels: Tensor, query: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits ``[B, Q, max_ways]`` of queries by examples ``[B, P, hidden_size]``, and maybe attention."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Embeddings ``[*, hidden_size]`` float32 of images ``[*, channels, height, width]``."""
        expected = (self.config.num_channels, *[self.config.image_size] * 2)
        if images.shape[-3:] != expected:
            raise DataError("images of another size", "images", f"[*, {expected}]", tuple(images.shape))
        x = self.encoder(images.flatten(0, -4))
        return x.unflatten(0, images.shape[:-3]).to(torch.promote_types(x.dtype, torch.float32))

    def forward(
        self,
        support_images: Tensor,
        support_labels: Tensor,
        query_images: Tensor | None = None,
        labels: Tensor | None = None,
        output_attention: bool = False,
        **kwargs,
    ) -> FewShotOutput:
        kwargs.pop("num_items_in_batch", None)
        count = support_images.size(1)
        # One pass for both, so that batch norm sees them together in training.
        images = support_images if query_images is None else torch.cat([support_images, query_images], dim=1)
        support, query = self.encode(images).split([count, images.size(1) - count], dim=1)
        # Distances in bfloat16 would tell classes apart by their rounding.
        with torch.autocast(support.device.type, enabled=False):
            query = None if query_images is None else query
            logits, attention = self.tell(support, support_labels, query)
            if labels is None and query is None:
                labels = support_labels
            loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return FewShotOutput(
            loss=loss, logits=logits, task_loss=loss, attention=attention if output_attention else None
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            init.zeros_(module.bias)
        scale = (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, AttendConv):
            init.normal_(module.lin_out.weight, std=std * scale)
        elif isinstance(module, FeedForward):
            init.normal_(module.down_proj.weight, std=std * scale)
        elif isinstance(module, EpisodeMemory):  # after its children
            init.normal_(module.bank.slots, std=0.02)
            for lin in (module.write_conv.lin_update, module.recall_conv.lin_query):
                init.eye_(lin.weight)
            for lin in (module.write_conv.lin_erase, module.gate):
                init.zeros_(lin.weight)
                init.constant_(lin.bias, 4.0)
            init.zeros_(module.recall_conv.log_temperature)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Modules without tensors of their own, such as the memory, would be skipped.
        super()._initialize_weights(module, is_custom_code=False)


class MemoryTransformer(FewShotModel):
    r"""Writes the examples of an episode into the slots of a memory, from which its queries read labels: see
    :class:`~graphmoe.nn.episode_memory.EpisodeMemory`. With every episode the memory begins anew.

    Examples that are told by one another do not look at the slot that they have written themselves.
    """

    def build_head(self) -> None:
        config = self.config
        self.memory = EpisodeMemory(config.hidden_size, config.num_slots, config.max_ways)

    def tell(
        self, support: Tensor, support_labels: Tensor, query: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        state = self.memory.write(support, support_labels)
        hidden = None
        if query is None:
            query = support
            hidden = torch.arange(support.size(1), device=support.device).expand(support.shape[:2])
        return self.recall(state, query, hidden)

    def recall(
        self, state: EpisodeState, query: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log probabilities ``[B, Q, max_ways]`` and attention ``[B, Q, S]`` of queries by a memory."""
        chance, attention = self.memory.read(state, query, hidden, return_attention_weights=True)
        return chance.clamp(min=torch.finfo(chance.dtype).tiny).log(), attention


class PrototypicalNetwork(FewShotModel):
    r"""The baseline (`Snell et al. 2017 <https://arxiv.org/abs/1703.05175>`_): the nearest mean.

    .. math::
        z_c = -\frac{1}{\sqrt F} \Bigl\lVert x - \frac{1}{|S_c|} \sum_{n \in S_c} x_n \Bigr\rVert^2

    An example that is told by the others is left out of the mean of its own label.
    """

    def tell(
        self, support: Tensor, support_labels: Tensor, query: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        label = F.one_hot(support_labels, self.config.max_ways).to(support.dtype)  # [B, P, C]
        total, count = label.transpose(1, 2) @ support, label.sum(dim=1)  # [B, C, F], [B, C]
        if query is not None:
            distance = _squares(query, total / count.clamp(min=1).unsqueeze(-1))  # [B, Q, C]
            known = (count > 0).unsqueeze(1)
        else:
            distance = _squares(support, total / count.clamp(min=1).unsqueeze(-1))
            # Only the mean of one's own label changes: m' - x = (m - x) n / (n - 1).
            others = count.unsqueeze(1) - label  # [B, P, C]
            grown = (count.unsqueeze(1) / others.clamp(min=1)).square()
            distance = torch.where(label > 0, distance * grown, distance)
            known = others > 0
        logits = -distance * support.size(-1) ** -0.5
        return logits.masked_fill(~known, NEVER), None


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``[B, Q, C]`` of ``x [B, Q, F]`` and ``y [B, C, F]``."""
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(-2)
    return torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2)
