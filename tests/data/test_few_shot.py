import numpy as np
import pytest
import torch

from graphmoe.data.few_shot import (
    Characters,
    Episodes,
    as_ink,
    distort,
    pixel_neighbours,
    split_characters,
)
from graphmoe.errors import DataError


def characters(count: int = 12, drawings: int = 6, side: int = 8) -> Characters:
    """Each pixel says which character and drawing it is of, and nothing in them repeats."""
    numbers = np.arange(count * drawings, dtype=np.uint8).reshape(count, drawings, 1, 1)
    images = np.broadcast_to(numbers, (count, drawings, side, side)).copy()
    return Characters(images, np.arange(count) // 3, ("a", "b", "c", "d"), "test")


def numbers(images: torch.Tensor) -> torch.Tensor:
    """Which drawing each image ``[*, 1, 8, 8]`` is."""
    return (images[..., 0, 0, 0] * 255).round().long()


# Dividing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["character", "alphabet"])
def test_no_character_is_in_both_parts(by):
    everything = characters()
    train, test = split_characters(everything, 5, by=by, seed=3)
    seen = [set(part.images[:, 0, 0, 0].tolist()) for part in (train, test)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == len(everything)
    if by == "alphabet":
        assert not set(train.alphabet) & set(test.alphabet) and len(test) == 3
    else:
        assert len(test) == 5
    again = split_characters(everything, 5, by=by, seed=3)
    assert [part.fingerprint for part in again] == [train.fingerprint, test.fingerprint]
    others = {split_characters(everything, 5, by=by, seed=seed)[1].fingerprint for seed in range(8)}
    assert len(others) > 1


def test_bad_divisions():
    with pytest.raises(DataError, match=r"split: unknown way to divide characters; .* character, alphabet"):
        split_characters(characters(), 2, by="colour")
    with pytest.raises(DataError, match=r"held_out: no such number .* from 1 to 11; got 12"):
        split_characters(characters(), 12)
    with pytest.raises(DataError, match="held_out: no alphabet is that small; expected at least 3; got 2"):
        split_characters(characters(), 2, by="alphabet")


# Episodes ---------------------------------------------------------------------------------------


def test_no_query_is_among_what_is_learned_from():
    episodes = Episodes(characters(), 5, 2, 3, seed=1)
    for index in range(50):
        episode = episodes.draw(index)
        assert len(set(episode.character)) == 5
        for support, query in zip(episode.support, episode.query, strict=True):
            assert len({*support, *query}) == 5


def test_a_batch_is_the_drawings_and_labels_of_its_episodes():
    episodes = Episodes(characters(), 4, 2, 3, seed=1)
    batch = episodes.batch(7, 3)
    assert batch["support_images"].shape == (3, 8, 1, 8, 8) and batch["query_images"].shape == (
        3,
        12,
        1,
        8,
        8,
    )
    for row in range(3):
        episode = episodes.draw(7, row)
        for part, labels, drawn in (
            ("support_images", "support_labels", episode.support),
            ("query_images", "labels", episode.query),
        ):
            wanted = [6 * c + d for c, ds in zip(episode.character, drawn, strict=True) for d in ds]
            assert numbers(batch[part][row]).tolist() == wanted
            of_label = episode.character[batch[labels][row].numpy()]
            assert (of_label == np.array(wanted) // 6).all()


@pytest.mark.parametrize("queries", [0, 2])
def test_a_batch_depends_on_seed_index_and_row_only(queries):
    options = {"turns": True, "augment": True}
    episodes = Episodes(characters(), 4, 2, queries, seed=5, **options)
    whole = episodes.batch(3, 4)
    episodes.batch(0, 4)
    parts = [Episodes(characters(), 4, 2, queries, seed=5, **options).batch(3, 4, s)
             for s in (slice(0, 1), slice(1, 4))]  # fmt: skip
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts])), name
    assert len(whole) == (4 if queries else 3)
    for other in (episodes.batch(4, 4), Episodes(characters(), 4, 2, queries, seed=6).batch(3, 4)):
        assert not torch.equal(other["support_images"], whole["support_images"])


def test_turns_are_characters_of_their_own():
    images = np.zeros((2, 2, 8, 8), dtype=np.uint8)
    images[0, :, 0, 1], images[1, :, 0, 2] = 255, 255
    data = Characters(images, np.zeros(2, dtype=np.int64), ("a",), "test")
    batch = Episodes(data, 8, 1, 1, turns=True).batch(0, 1)
    wanted = {np.rot90(image[0], n).tobytes() for image in images for n in range(4)}
    for part in ("support_images", "query_images"):
        found = {(image[0].numpy() * 255).astype(np.uint8).tobytes() for image in batch[part][0]}
        assert found == wanted
    assert torch.equal(
        batch["support_images"], batch["query_images"]
    )  # a query is turned as its character is


def test_episodes_larger_than_the_data():
    data = characters()
    with pytest.raises(DataError, match=r"ways: no such episode .* from 2 to 12; got 13"):
        Episodes(data, 13, 1, 1)
    assert Episodes(data, 48, 1, 1, turns=True).ways == 48
    with pytest.raises(
        DataError, match=r"shots: no such episode .* at most 6 drawings; got '5 shots and 2 q"
    ):
        Episodes(data, 5, 5, 2)


# Images -----------------------------------------------------------------------------------------


def test_ink_is_one():
    assert torch.equal(as_ink(np.array([[[0, 255]]], dtype=np.uint8)), torch.tensor([[[[0.0, 1.0]]]]))


def test_distortion_is_small_and_none_at_zero():
    images = torch.zeros(20, 1, 28, 28)
    images[:, :, 10:18, 12:16] = 1
    same = distort(images, np.random.default_rng(0), angle=0, scale=0, shift=0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
    moved = distort(images, np.random.default_rng(0), angle=0, scale=0, shift=0.1)
    place = torch.arange(28.0)
    centre = torch.stack([(moved.sum(a) * place).sum((1, 2)) / moved.sum((1, 2, 3)) for a in (2, 3)])
    off = (centre - torch.tensor([[13.5], [13.5]])).abs()
    assert off.max() <= 0.1 * 28 + 1e-3 and off.max() > 1
    ink = distort(images, np.random.default_rng(0)).sum((1, 2, 3)) / 32
    assert ink.min() > 0.85**2 - 0.05 and ink.max() < 1.15**2 + 0.05 and ink.std() > 0.05


def test_nearest_pixels():
    data = characters()  # a drawing is nearest to those of the same character, but at its ends
    right = pixel_neighbours(Episodes(data, 5, 2, 3), range(20))
    assert right.shape == (20,) and right.mean() > 0.9
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, data.images.shape, dtype=np.uint8)
    data = Characters(noise, data.alphabet, data.alphabet_names, "noise")
    assert abs(pixel_neighbours(Episodes(data, 5, 1, 4), range(200)).mean() - 0.2) < 0.05
