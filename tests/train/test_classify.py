"""Scores of classifiers, and counts of what was routed: of the texts, whatever the batches."""

import numpy as np
import pytest
import torch
from tiny_model import SIZES
from torch.nn import functional as F

from graphmoe.data.labelled_batches import LabelledBatches
from graphmoe.errors import DataError
from graphmoe.models import GraphMoEConfig, GraphMoEForSequenceClassification
from graphmoe.train.classify import answers, routing_summary, score_texts


def build(**options) -> GraphMoEForSequenceClassification:
    config = GraphMoEConfig(**{**SIZES, "is_causal": False, "num_labels": 3, "dropout": 0.5, **options})
    return GraphMoEForSequenceClassification(config).double()


@pytest.fixture
def batches() -> LabelledBatches:
    random = np.random.default_rng(0)
    rows = [random.integers(31, size=length) for length in random.integers(1, 12, size=21)]
    return LabelledBatches(rows, random.integers(3, size=21), pad=0)


@pytest.mark.parametrize(
    "options", [{}, {"router": "expert_choice"}, {"num_experts": 1, "num_experts_per_tok": 1}]
)
def test_scores_are_those_of_each_text(batches, options):
    model = build(**options).train()
    loss, right, counts = answers(model, batches.sequential(4))
    assert model.training and all(module.training for module in model.modules())
    order = np.argsort(batches.lengths, kind="stable")
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.from_numpy(batches.rows[i])[None]).logits for i in order])
    labels = torch.from_numpy(batches.labels[order])
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(right, logits.argmax(dim=1) == labels)
    figures = score_texts(model, batches.sequential(7))
    assert figures["loss"] == pytest.approx(loss.mean().item())
    assert figures["accuracy"] == right.double().mean().item()
    other = answers(model, batches.sequential(9))[2]
    assert len(counts) == (0 if options.get("num_experts") == 1 else 2)
    for one, two in zip(counts, other, strict=True):
        assert int(one.tokens) == batches.lengths.sum()
        assert all(torch.allclose(a.double(), b.double()) for a, b in zip(one, two, strict=True))


def test_how_tokens_are_spread(batches):
    model = build(router="expert_choice", num_experts_per_tok=1)
    figures = routing_summary(model, answers(model, batches.sequential(8))[2])
    # Of n tokens each of 4 experts takes ceil(n / 4).
    share = sum(-(-length // 4) for length in batches.lengths) / batches.lengths.sum()
    assert figures["edges_per_token"] == pytest.approx([4 * share] * 2)
    assert figures["unserved_random"] == pytest.approx([(1 - share) ** 4] * 2)
    assert figures["max_violation"] == [0.0, 0.0] and figures["dead_experts"] == [0.0, 0.0]
    assert all(0 < value < 1 for value in figures["unserved"])
    plain = build()
    figures = routing_summary(plain, answers(plain, batches.sequential(8))[2])
    assert figures["edges_per_token"] == [2.0, 2.0] and "unserved_random" not in figures
    assert routing_summary(plain, []) == {}


def test_nothing_to_score():
    with pytest.raises(DataError, match="texts: nothing to score"):
        score_texts(build(), [])
