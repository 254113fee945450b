"""Images as batches of inputs, in an order that any resumed or distributed run agrees on."""

import numpy as np

from graphmoe.data.images import ImageData
from graphmoe.errors import DataError


class ImageBatches:
    """Batches of images, each moved and maybe mirrored at random, in an order that depends on the seed only.

    What a batch holds is a pure function of ``(seed, index, size)`` and its ``slots``. Every epoch has its
    own permutation; images that do not fill its last batch are left out of it, other ones each time.

    Args:
        data: The images; those of its training part are served.
        seed: Of the order, the shifts and the flips.
        shift: Most pixels that an image is moved, up or down and to a side; what comes in is 0.
        flip: Whether each image is mirrored, left to right, with probability 1/2.

    Raises:
        DataError: A negative shift, or one as large as the image.
    """

    def __init__(self, data: ImageData, *, seed: int = 0, shift: int = 0, flip: bool = False):
        height = min(data.image_shape[1:])
        if not 0 <= shift < height:
            raise DataError("no shift of these images", "--shift", f"from 0 to {height - 1}", shift)
        self.data, self.seed, self.shift, self.flip = data, seed, shift, flip
        pad = ((0, 0), (0, 0), (shift, shift), (shift, shift))
        padded = np.pad(data.train.images, pad)
        windows = np.lib.stride_tricks.sliding_window_view(padded, data.image_shape[1:], axis=(2, 3))
        self._windows = windows.transpose(0, 2, 3, 1, 4, 5)  # [n, shifts, shifts, C, H, W], a view
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def steps_per_epoch(self, size: int) -> int:
        """Batches of an epoch.

        Raises:
            DataError: Fewer images than a batch.
        """
        if size > len(self.data.train):
            raise DataError("fewer images than a batch", "--batch_size", len(self.data.train), size)
        return len(self.data.train) // size

    def batch(self, index: int, size: int, slots: slice) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``slots`` of global batch ``index``: inputs ``[n, C, H, W]`` float32 and labels ``[n]``."""
        epoch, place = divmod(index, self.steps_per_epoch(size))
        if self._epoch[0] != epoch:
            random = np.random.default_rng(np.random.SeedSequence([self.seed, 0, epoch]))
            self._epoch = (epoch, random.permutation(len(self.data.train)))
        rows = self._epoch[1][place * size : (place + 1) * size][slots]
        random = np.random.default_rng(np.random.SeedSequence([self.seed, 1, index]))
        down, right = random.integers(0, 2 * self.shift + 1, (2, size))[:, slots]
        images = self._windows[rows, down, right]
        if self.flip:
            mirrored = random.integers(0, 2, size)[slots].astype(bool)
            images[mirrored] = images[mirrored, ..., ::-1]
        return self.data.normalise(images), self.data.train.labels[rows]
