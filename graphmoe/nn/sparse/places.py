"""Random places of a matrix, by their number ``target * in_channels + source``, without a dense mask."""

import torch
from torch import Tensor

from graphmoe.errors import ConfigError


def draw_places(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` different numbers from ``[0, total)``, every set of them equally likely.

    Returns:
        ``[count]`` int64, ascending, on the CPU.

    Raises:
        ConfigError: More than there are.
    """
    if not 0 <= count <= total:
        raise ConfigError("more edges than places", "count", f"0 to {total}", count)
    on_cpu = {"generator": generator, "device": "cpu"}
    if 4 * count >= total:
        return torch.randperm(total, **on_cpu)[:count].sort().values
    # Numbers drawn one by one until enough are different, and some of those: no list of all places.
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while found.numel() < count:
        lacking = count - found.numel()
        more = torch.randint(total, (lacking + lacking // 4 + 16,), **on_cpu)
        found = torch.cat([found, more]).unique()
    return found[torch.randperm(found.numel(), **on_cpu)[:count]].sort().values


def draw_absent(present: Tensor, total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` different numbers from those of ``[0, total)`` that are not in ``present``.

    Args:
        present: Different numbers, ascending, ``[M]`` int64.
        total: Numbers in all.
        count: How many to draw.
        generator: Of the CPU; default: torch's own.

    Returns:
        ``[count]`` int64, ascending, on the device of ``present``.

    Raises:
        ConfigError: More than are absent.
    """
    ranks = draw_places(total - present.numel(), count, generator).to(present.device)
    # The r-th absent number is r plus as many present ones as have at most r absent ones below them.
    below = present - torch.arange(present.numel(), device=present.device)
    return ranks + torch.searchsorted(below, ranks, right=True)


def largest_absent(score: Tensor, present: Tensor, count: int) -> Tensor:
    """The ``count`` places with the largest ``score [total]`` that are not in ``present``, ascending; of
    equal ones the first."""
    score = score.index_fill(0, present, -1.0)
    if count == 0:
        return present[:0]
    # topk breaks ties as it likes, so it only says how large a score has to be.
    least = score.topk(count).values[-1]
    above = (score > least).nonzero().flatten()
    equal = (score == least).nonzero().flatten()[: count - above.numel()]
    return torch.cat([above, equal]).sort().values
