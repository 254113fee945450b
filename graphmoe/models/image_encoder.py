"""Small encoders of images: four convolutions, or a transformer over patches."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from graphmoe.nn import AttendConv, Block, FeedForward, RMSNorm


class ConvEncoder(nn.Module):
    r"""Four times convolution, batch norm, ReLU and pooling, as in
    `prototypical networks <https://arxiv.org/abs/1703.05175>`_.

    In eval mode the norms use what they have seen in training, so that an image has one embedding whatever
    else is in its batch.

    Args:
        num_channels: Channels of an image.
        image_size: Its height and width, at least 16.
        hidden_channels: Channels of every convolution.
        out_channels: Channels of an embedding.

    Shapes:
        - **input:** ``[N, num_channels, image_size, image_size]``.
        - **output:** ``[N, out_channels]``.
    """

    def __init__(self, num_channels: int, image_size: int, hidden_channels: int, out_channels: int):
        super().__init__()
        channels = (num_channels, *[hidden_channels] * 4)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden_channels) for _ in self.convs)
        flat = hidden_channels * (image_size // 16) ** 2
        self.lin = nn.Identity() if flat == out_channels else nn.Linear(flat, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.max_pool2d(norm(conv(x)), 2).relu()  # pooled first, that is a quarter of them
        return self.lin(x.flatten(1))


class PatchEncoder(nn.Module):
    r"""A transformer over the patches of an image (`ViT <https://arxiv.org/abs/2010.11929>`_): every patch
    attends to all of its image; the embedding is the mean over patches.

    Args:
        num_channels: Channels of an image.
        image_size: Its height and width.
        patch_size: Those of a patch; divides them.
        hidden_channels: Channels ``D`` of a patch.
        out_channels: Channels of an embedding.
        num_layers: Blocks.
        heads: Attention heads of each.

    Shapes:
        - **input:** ``[N, num_channels, image_size, image_size]``.
        - **output:** ``[N, out_channels]``.
    """

    def __init__(
        self,
        num_channels: int,
        image_size: int,
        patch_size: int,
        hidden_channels: int,
        out_channels: int,
        *,
        num_layers: int = 4,
        heads: int = 8,
    ):
        super().__init__()
        self.patches = nn.Conv2d(num_channels, hidden_channels, patch_size, stride=patch_size)
        self.position = nn.Embedding((image_size // patch_size) ** 2, hidden_channels)
        self.blocks = nn.ModuleList(
            Block(
                AttendConv(hidden_channels, heads, causal=False),
                FeedForward(hidden_channels, 2 * hidden_channels, activation="gelu"),
                hidden_channels,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_channels)
        self.lin = nn.Linear(hidden_channels, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position.weight  # [N, T, D]
        for block in self.blocks:
            x, *_ = block(x)
        return self.lin(self.norm(x).mean(dim=1))
