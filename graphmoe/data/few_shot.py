"""Characters of many alphabets, and episodes: learn a few characters by a few drawings, tell others apart."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graphmoe.errors import DataError

SPLITS = ("character", "alphabet")
TURNS = 4
"""Quarter turns of a character; each is a character of its own where turns count."""


@dataclass(frozen=True, eq=False)
class Characters:
    """Drawings of characters, as many of each.

    Attributes:
        images: Ink of the drawings, ``[characters, drawings, height, width]`` uint8, 0 where there is none.
        alphabet: Alphabet of each character, ``[characters]`` int64.
        alphabet_names: Name of each alphabet.
        name: Name of the data.
    """

    images: np.ndarray
    alphabet: np.ndarray
    alphabet_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def drawings(self) -> int:
        """Drawings of each character."""
        return self.images.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the drawings, and of which character is where."""
        digest = hashlib.sha256(repr((self.images.shape, self.alphabet.tolist())).encode())
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()

    def take(self, chosen: np.ndarray) -> "Characters":
        """Some of the characters, in the order of their numbers in ``chosen``."""
        return Characters(self.images[chosen], self.alphabet[chosen], self.alphabet_names, self.name)

    def describe(self) -> str:
        """One line about the data."""
        height, width = self.images.shape[2:]
        return (
            f"{len(self):,} characters of {len(np.unique(self.alphabet))} alphabets, "
            f"{self.drawings} drawings of {height} x {width} each"
        )


def split_characters(
    characters: Characters, held_out: int, *, by: str = "character", seed: int = 0
) -> tuple[Characters, Characters]:
    """Divide characters into those to train on and those never seen in training.

    Args:
        characters: All of them.
        held_out: How many are not trained on; with ``by="alphabet"`` the most.
        by: ``character``: any ones, so that both parts know the alphabets. ``alphabet``: whole alphabets, in
            random order, of which those are held out that still fit.
        seed: Of the order, at least 0.

    Returns:
        The characters to train on, and the others.

    Raises:
        DataError: An unknown way to divide, or a part without a character.
    """
    if by not in SPLITS:
        raise DataError("unknown way to divide characters", "split", f"one of {', '.join(SPLITS)}", by)
    if not 0 < held_out < len(characters):
        expected = f"from 1 to {len(characters) - 1}"
        raise DataError("no such number of held-out characters", "held_out", expected, held_out)
    rng = np.random.default_rng([seed, 0])
    if by == "character":
        order = rng.permutation(len(characters))
        return characters.take(order[held_out:]), characters.take(order[:held_out])
    test = np.zeros(len(characters), dtype=bool)
    for alphabet in rng.permutation(np.unique(characters.alphabet)):
        members = characters.alphabet == alphabet
        if test.sum() + members.sum() <= held_out:
            test |= members
    if not test.any():
        smallest = min(np.unique(characters.alphabet, return_counts=True)[1])
        raise DataError("no alphabet is that small", "held_out", f"at least {smallest}", held_out)
    return characters.take(np.flatnonzero(~test)), characters.take(np.flatnonzero(test))


class Episode(NamedTuple):
    """What one episode is made of.

    Attributes:
        character: Number of each of its characters, ``[ways]``.
        turn: Quarter turns of each, ``[ways]``.
        support: Drawings to learn from, ``[ways, shots]``.
        query: Drawings to tell, ``[ways, queries]``, none of them one of ``support``.
    """

    character: np.ndarray
    turn: np.ndarray
    support: np.ndarray
    query: np.ndarray


class Episodes:
    """Episodes of ``ways`` characters with ``shots`` drawings each to learn from, and ``queries`` to tell.

    Episode ``(index, row)`` is a pure function of these two and the seed.

    Args:
        characters: What they are drawn from.
        ways: Characters of an episode.
        shots: Drawings of each to learn from.
        queries: Other drawings of each to tell; 0 where every drawing is to be told by the others.
        turns: Let a character turned by 90, 180 and 270 degrees be three more characters.
        augment: Turn each image by up to 10 degrees, scale it by up to 15 % and shift it by up to 10 %, at
            random.
        seed: At least 0.

    Raises:
        DataError: An episode that takes more than the data have.
    """

    def __init__(
        self,
        characters: Characters,
        ways: int,
        shots: int,
        queries: int,
        *,
        turns: bool = False,
        augment: bool = False,
        seed: int = 0,
    ):
        classes = len(characters) * (TURNS if turns else 1)
        if not 2 <= ways <= classes:
            raise DataError("no such episode of these characters", "ways", f"from 2 to {classes}", ways)
        if shots < 1 or queries < 0 or shots + queries > characters.drawings:
            expected = f"at least 1 shot, and with queries at most {characters.drawings} drawings"
            got = f"{shots} shots and {queries} queries"
            raise DataError("no such episode of these drawings", "shots", expected, got)
        self.characters, self.ways, self.shots, self.queries = characters, ways, shots, queries
        self.turns, self.augment, self.seed = turns, augment, seed

    def draw(self, index: int, row: int = 0) -> Episode:
        """What episode ``row`` of batch ``index`` is made of."""
        return self._draw(np.random.default_rng([self.seed, index, row]))

    def batch(self, index: int, size: int, slots: slice = slice(None)) -> dict[str, Tensor]:
        """The episodes ``slots`` of global batch ``index`` of ``size`` episodes.

        Returns:
            ``support_images [B, P, 1, height, width]`` float32, ink 1, and ``support_labels [B, P]``, with
            ``P = ways * shots``; where there are queries, ``query_images`` and ``labels`` of as many as those
            are, else ``labels`` are those of the support. Labels count the characters of an episode.
        """
        rows = [self._images(index, row) for row in range(size)[slots]]
        support, query = (torch.stack([row[part] for row in rows]) for part in range(2))
        labels = torch.arange(self.ways).expand(len(rows), -1)
        known = labels.repeat_interleave(self.shots, dim=1)
        if not self.queries:
            return {"support_images": support, "support_labels": known, "labels": known.clone()}
        return {
            "support_images": support,
            "support_labels": known,
            "query_images": query,
            "labels": labels.repeat_interleave(self.queries, dim=1),
        }

    def _draw(self, rng: np.random.Generator) -> Episode:
        classes = len(self.characters) * (TURNS if self.turns else 1)
        character, turn = np.divmod(rng.choice(classes, self.ways, replace=False), TURNS if self.turns else 1)
        drawing = rng.random((self.ways, self.characters.drawings)).argsort(axis=1)
        support, query = drawing[:, : self.shots], drawing[:, self.shots : self.shots + self.queries]
        return Episode(character, turn, support, query)

    def _images(self, index: int, row: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, index, row])
        episode = self._draw(rng)
        drawing = np.concatenate([episode.support, episode.query], axis=1)
        images = self.characters.images[episode.character[:, None], drawing]
        images = np.stack([np.rot90(x, n, (1, 2)) for x, n in zip(images, episode.turn, strict=True)])
        images = as_ink(images).flatten(0, 1)
        if self.augment:
            images = distort(images, rng)
        support, query = images.unflatten(0, drawing.shape).split([self.shots, self.queries], dim=1)
        return support.flatten(0, 1), query.flatten(0, 1)

    def __repr__(self) -> str:
        sizes = f"{self.ways} ways, {self.shots} shots, {self.queries} queries"
        return f"{type(self).__name__}({sizes} of {len(self.characters):,} characters, seed={self.seed})"


def as_ink(images: np.ndarray) -> Tensor:
    """Images ``[*, height, width]`` uint8 as ``[*, 1, height, width]`` float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(-3).float() / 255


def distort(
    images: Tensor, rng: np.random.Generator, *, angle: float = 10.0, scale: float = 0.15, shift: float = 0.1
) -> Tensor:
    """Turn, scale and shift each of ``images [N, 1, height, width]`` at random.

    Args:
        images: Where nothing is, they are 0.
        rng: Gives all random numbers.
        angle: Most degrees to turn by, either way.
        scale: Most to grow or shrink by, as a fraction.
        shift: Most to shift by along each axis, as a fraction of the width.
    """
    count = len(images)
    turn = torch.from_numpy(rng.uniform(-angle, angle, count) * math.pi / 180).float()
    grow = torch.from_numpy(rng.uniform(1 - scale, 1 + scale, count)).float()
    # Coordinates run from -1 to 1, so that the width is 2.
    move = torch.from_numpy(rng.uniform(-2 * shift, 2 * shift, (count, 2))).float()
    cosine, sine = turn.cos() / grow, turn.sin() / grow
    rows = (torch.stack([cosine, -sine, move[:, 0]], 1), torch.stack([sine, cosine, move[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, dim=1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def pixel_neighbours(episodes: Episodes, numbers: Sequence[int]) -> np.ndarray:
    """How well the nearest drawing tells queries, by squared distance of raw pixels: the least to beat.

    Args:
        episodes: Those to tell, with queries.
        numbers: Which of them.

    Returns:
        Fraction of right answers of each episode, ``[numbers]`` float64.
    """
    pixels = torch.from_numpy(episodes.characters.images).flatten(2).float() / 255
    asked = torch.arange(episodes.ways).repeat_interleave(episodes.queries)
    right = np.zeros(len(numbers))
    for place, number in enumerate(numbers):
        episode = episodes.draw(number)
        rows = torch.from_numpy(episode.character)[:, None]
        support = pixels[rows, torch.from_numpy(episode.support)].flatten(0, 1)  # [P, pixels]
        query = pixels[rows, torch.from_numpy(episode.query)].flatten(0, 1)
        nearest = torch.cdist(query, support).argmin(dim=1)
        right[place] = (nearest // episodes.shots == asked).double().mean()
    return right
