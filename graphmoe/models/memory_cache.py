"""What decoding keeps of each block beside keys and values: the contents of its memory."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from graphmoe.errors import ConfigError
from graphmoe.typing import MemoryState


class MemoryLayerCache(DynamicLayer):
    """Keys and values of one block, and what its memory holds after them.

    Attributes:
        memory: The contents, or ``None`` before the first token.
    """

    is_croppable = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.memory: MemoryState | None = None

    def reset(self) -> None:
        super().reset()
        self.memory = None

    def offload(self) -> None:
        super().offload()
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._each(lambda part: part.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0: what a token wrote cannot be taken back.

        Raises:
            ConfigError: Another number of tokens.
        """
        if tokens_to_remove:
            raise ConfigError("a memory does not forget its last tokens", "crop", 0, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda part: part[indices.to(part.device)])

    def _each(self, change) -> None:
        if self.memory is not None:
            self.memory = MemoryState(*(change(part) for part in self.memory))


def remember(cache: Cache) -> None:
    """Make a cache one that has room for memories, if nothing is in it yet.

    Raises:
        ConfigError: A cache with layers of another kind, such as a static one, or that already has keys but
            no memories.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = MemoryLayerCache
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MemoryLayerCache):
            continue
        if type(layer) is not DynamicLayer or layer.is_initialized:
            what, expected = "no room for memories", "None, or an empty DynamicCache"
            raise ConfigError(what, "cache", expected, type(layer).__name__)
        cache.layers[index] = MemoryLayerCache()
