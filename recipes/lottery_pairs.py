"""Two classifiers on the same images: how often only one of them is right."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from graphmoe.data.image_files import LabelledImages
from graphmoe.data.images import ImageData
from recipes.reporting import say

BATCH = 500
"""Images answered at once."""


@torch.no_grad()
def wrong_answers(model: nn.Module, data: ImageData, part: LabelledImages) -> list[int]:
    """Places of the images of a part whose class a model, in eval mode, does not find, in ascending order."""
    device, answers = next(model.parameters()).device, []
    for start in range(0, len(part), BATCH):
        images = np.ascontiguousarray(data.normalise(part.images[start : start + BATCH]))
        answers.append(model(pixel_values=torch.from_numpy(images).to(device)).logits.argmax(dim=1).cpu())
    return np.flatnonzero(torch.cat(answers).numpy() != part.labels).tolist()


def paired(wrong: Collection[int], other_wrong: Collection[int]) -> dict[str, int | float]:
    r"""Compare two classifiers by the images of which only one of them finds the class
    (`McNemar 1947 <https://doi.org/10.1007/BF02295996>`_).

    If both were equally good, each such image would be a toss of a coin. Two-sided, with :math:`n` images, of
    which the one that finds fewer finds :math:`m`,

    .. math:: p = \min\Bigl(1,\; 2^{1-n} \sum_{i \le m} \tbinom{n}{i}\Bigr)

    Args:
        wrong: Images that the classifier gets wrong.
        other_wrong: Images that the other one gets wrong, of the same part.

    Returns:
        ``only_this`` and ``only_other``, images that only one of them gets right, and ``p_value``.
    """
    only_other, only_this = len(set(wrong) - set(other_wrong)), len(set(other_wrong) - set(wrong))
    images, fewer = only_this + only_other, min(only_this, only_other)
    tail = sum(math.comb(images, found) for found in range(fewer + 1))
    return {"only_this": only_this, "only_other": only_other, "p_value": min(1.0, 2 * tail / 2**images)}


def say_pairs(rows: Sequence[Mapping[str, object]], images: int) -> None:
    """Say how networks of levels and branches compare with the dense network, on ``images`` images."""
    # Largest where half of the answers are right; that of a difference of two networks is larger.
    error = 100 * math.sqrt(0.25 / images)
    say(f"\nagainst the dense network, on {images:,} test images; standard error of one accuracy: at most "
        f"{error:.1f} points")  # fmt: skip
    say(f"{'seed':>4} {'share, %':>9} {'branch':>7} {'points':>7}  right: only it, only dense    p")
    for row in rows:
        points = 100 * (row["only_this"] - row["only_other"]) / images
        p = f"{row['p_value']:.3f}" if row["p_value"] >= 0.001 else "<0.001"
        say(f"{row['seed']:>4} {100 * row['share']:>9.2f} {row['branch']:>7} {points:>+7.1f}  "
            f"{row['only_this']:>14} {row['only_other']:>11}  {p:>6}")  # fmt: skip
