"""Scores of few-shot models: drawings are embedded once, then told in many episodes."""

import math

import numpy as np
import torch
from torch import Tensor

from graphmoe.data.few_shot import Characters, Episode, Episodes, as_ink, distort
from graphmoe.models import MemoryTransformer
from graphmoe.models.memory_transformer import FewShotModel
from graphmoe.train.evaluate import evaluating

EPISODES = 100
"""Episodes told at once."""


@torch.no_grad()
def embed(model: FewShotModel, characters: Characters, *, views: int = 1, batch_size: int = 500) -> Tensor:
    """Embeddings of all drawings in eval mode, ``[characters, drawings, hidden_size]``.

    Args:
        model: What embeds them.
        characters: What they are drawings of.
        views: The embedding of a drawing is the mean of its own and of those of ``views - 1`` slight
            distortions of it: half of those of training, the same for all models.
        batch_size: Drawings embedded at once.
    """
    device = next(model.parameters()).device
    images = as_ink(characters.images).flatten(0, 1)
    total = torch.zeros(())
    with evaluating(model):
        for view in range(views):
            seen = images
            if view:
                seen = distort(images, np.random.default_rng(view), angle=5.0, scale=0.07, shift=0.05)
            parts = [model.encode(part.to(device)) for part in seen.split(batch_size)]
            total = total.to(device) + torch.cat(parts)
    return (total / views).unflatten(0, characters.images.shape[:2])


@torch.no_grad()
def score(model: FewShotModel, embeddings: Tensor, episodes: Episodes, count: int) -> Tensor:
    """Fraction of the queries of each of the first ``count`` episodes that are told right, ``[count]``."""
    right = []
    labels = torch.arange(episodes.ways, device=embeddings.device)
    with evaluating(model):
        for start in range(0, count, EPISODES):
            drawn = [episodes.draw(index) for index in range(start, min(start + EPISODES, count))]
            support, query = gather(embeddings, drawn)
            known = labels.repeat_interleave(episodes.shots).expand(len(drawn), -1)
            asked = labels.repeat_interleave(episodes.queries)
            logits, _ = model.tell(support, known, query)
            right.append((logits.argmax(dim=-1) == asked).double().mean(dim=1).cpu())
    return torch.cat(right)


def gather(embeddings: Tensor, drawn: list[Episode]) -> tuple[Tensor, Tensor]:
    """Embeddings of the drawings to learn from and of those to tell, ``[B, ways * n, hidden_size]`` each."""
    character = np.stack([episode.character for episode in drawn])[..., None]  # [B, ways, 1]
    parts = []
    for drawings in ([e.support for e in drawn], [e.query for e in drawn]):
        index = (torch.from_numpy(part).to(embeddings.device) for part in (character, np.stack(drawings)))
        parts.append(embeddings[tuple(index)].flatten(1, 2))
    return parts[0], parts[1]


def spread(right: Tensor) -> tuple[float, float]:
    """Mean over episodes and its standard error."""
    error = right.std().item() / len(right) ** 0.5 if len(right) > 1 else 0.0
    return right.mean().item(), error


def chance(ways: int) -> float:
    """Accuracy of a guess."""
    return 1 / ways


@torch.no_grad()
def reading(model: MemoryTransformer, embeddings: Tensor, episodes: Episodes) -> dict[str, float]:
    """How the memory is read and written in some episodes, each figure beside what blind reading gives.

    Returns:
        ``right``: attention to slots of the right label; ``entropy``: of the attention of a query, bits; both
        means over queries, and both also as ``.._uniform``. ``gate``: how much of an example is written.
        ``temperature``: what distances are multiplied with.
    """
    drawn = [episodes.draw(index) for index in range(EPISODES)]
    support, query = gather(embeddings, drawn)
    label = torch.arange(episodes.ways, device=support.device)
    known = label.repeat_interleave(episodes.shots)  # [P]
    with evaluating(model):
        state = model.memory.write(support, known.expand(len(drawn), -1))
        _, attention = model.recall(state, query)  # [B, Q, S]
    attention = attention[..., : len(known)].double()
    same = label.repeat_interleave(episodes.queries).unsqueeze(1) == known  # [Q, P]
    return {
        "right": (attention * same).sum(dim=-1).mean().item(),
        "right_uniform": 1 / episodes.ways,
        "entropy": -torch.xlogy(attention, attention).sum(dim=-1).mean().item() / math.log(2),
        "entropy_uniform": math.log2(len(known)),
        "gate": state.values[:, : len(known)].sum(dim=-1).mean().item(),
        "temperature": model.memory.recall_conv.log_temperature.exp().item(),
    }


@torch.no_grad()
def episode_records(
    model: MemoryTransformer, characters: Characters, episodes: Episodes, *, views: int = 1
) -> dict[str, Tensor]:
    """One episode as arrays for a picture: what was written where, and what was read.

    Returns:
        ``final_episode_support [P, height, width]`` and ``final_episode_query [Q, height, width]`` uint8,
        ``final_episode_support_labels [P]``, ``final_episode_labels [Q]``, ``final_episode_answers [Q]``,
        ``final_episode_attention [Q, P]`` to the slots in the order of the support, and
        ``final_episode_gate [P]``.
    """
    drawn = episodes.draw(0)
    labels = torch.arange(episodes.ways)
    known, asked = (labels.repeat_interleave(n) for n in (episodes.shots, episodes.queries))
    support, query = gather(embed(model, characters, views=views), [drawn])
    device = support.device
    with evaluating(model):
        state = model.memory.write(support, known.to(device).unsqueeze(0))
        logits, attention = model.recall(state, query)
    images = characters.images[drawn.character[:, None], np.concatenate([drawn.support, drawn.query], axis=1)]
    images = torch.from_numpy(images)  # [ways, shots + queries, height, width]
    return {
        "final_episode_support": images[:, : episodes.shots].flatten(0, 1),
        "final_episode_query": images[:, episodes.shots :].flatten(0, 1),
        "final_episode_support_labels": known,
        "final_episode_labels": asked,
        "final_episode_answers": logits[0].argmax(dim=-1).cpu(),
        "final_episode_attention": attention[0, :, : len(known)].float().cpu(),
        "final_episode_gate": state.values[0, : len(known)].sum(dim=-1).float().cpu(),
    }
