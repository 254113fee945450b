"""What a classifier without a neural network reaches on the same texts."""

import time

import numpy as np

from graphmoe.data.labelled_text import LabelledText

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse strengths of regularisation to choose from."""


def tfidf(data: LabelledText) -> dict[str, float | str]:
    """TF-IDF of words and pairs of words, and logistic regression: scores on the test part.

    Words are counted on the training part; the strength of regularisation is the one with the best
    validation loss.

    Returns:
        ``name``, ``accuracy``, ``loss`` (nats), ``validation_accuracy``, ``strength`` and ``seconds``.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    began = time.perf_counter()
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    train = words.fit_transform(data.train.texts)
    validation, test = (words.transform(part.texts) for part in (data.validation, data.test))
    best: tuple[float, float, LogisticRegression] | None = None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(train, data.train.labels)
        loss = _loss(model, validation, data.validation.labels)
        if best is None or loss < best[0]:
            best = (loss, strength, model)
    _, strength, model = best
    return {
        "name": "TF-IDF + logistic regression",
        "accuracy": float(model.score(test, data.test.labels)),
        "loss": _loss(model, test, data.test.labels),
        "validation_accuracy": float(model.score(validation, data.validation.labels)),
        "strength": strength,
        "seconds": time.perf_counter() - began,
    }


def _loss(model: object, features: object, labels: np.ndarray) -> float:
    """Mean cross-entropy, nats; every class is in the training part, so its column is its number."""
    return float(-model.predict_log_proba(features)[np.arange(len(labels)), labels].mean())
