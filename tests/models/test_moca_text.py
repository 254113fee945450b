"""The classifier of slots, experts and n-grams: votes as an oracle counts them, texts that stay apart."""

import numpy as np
import pytest
import torch
from contract import assert_eval_changes_nothing, assert_every_parameter_learns, assert_same
from transformers import AutoModelForSequenceClassification

import graphmoe
from graphmoe.data.ngrams import TextHasher, document_frequency, gather
from graphmoe.errors import ConfigError
from graphmoe.models import MocaForSequenceClassification, MocaTextConfig
from graphmoe.models.moca_text import NGramVotes
from graphmoe.nn import edge_form

TEXTS = ["a fine film , a fine cast", "bad", "not good not good at all", "good and fine and good and long"]
HASHER = TextHasher(40, 600)
SIZES = {"vocab_size": 40, "num_ngrams": 600, "hidden_size": 16, "intermediate_size": 8, "num_slots": 5}


def build(**options) -> MocaForSequenceClassification:
    model = MocaForSequenceClassification(MocaTextConfig(**{**SIZES, "num_labels": 3, **options})).double()
    if model.votes is not None:
        torch.nn.init.normal_(model.votes.weight)
        hashed = [HASHER(text) for text in TEXTS]
        model.votes.count(torch.from_numpy(document_frequency(hashed, 600)), len(hashed))
    return model.eval()


def inputs(texts=TEXTS, *, ngrams=True) -> dict[str, torch.Tensor]:
    batch = gather([HASHER(text) for text in texts])
    found = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if ngrams:
        found |= {"ngrams": batch.ngrams, "counts": batch.counts, "texts": batch.texts}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def votes(buckets=12, out_channels=2, **options) -> NGramVotes:
    layer = NGramVotes(buckets, out_channels, **options).double()
    torch.nn.init.normal_(layer.weight)
    return layer


def edges():
    ngrams = torch.tensor([0, 3, 7, 2, 3, 11, 8])
    counts = torch.tensor([1, 4, 2, 1, 1, 3, 5])
    return ngrams, counts, torch.tensor([0, 0, 0, 1, 3, 3, 3])  # text 2 has none


def test_votes_are_those_of_a_double_loop():
    layer = votes(scale=3.0)
    frequency = torch.tensor([1, 0, 5, 2, 1, 1, 1, 3, 0, 1, 1, 5])
    layer.count(frequency, 5)
    ngrams, counts, texts = edges()
    want = torch.zeros(4, 2, dtype=torch.double)
    for text in range(4):
        for words in (True, False):
            terms = []
            for ngram, count, home in zip(ngrams.tolist(), counts.tolist(), texts.tolist(), strict=True):
                if home == text and (ngram < 6) == words and frequency[ngram] > 0:
                    rarity = 1 + np.log(6 / (1 + frequency[ngram].item()))
                    terms.append((ngram, (1 + np.log(count)) * rarity))
            length = np.sqrt(sum(weight**2 for _, weight in terms))
            for ngram, weight in terms:
                want[text] += 3.0 * weight / length * layer.weight[ngram].detach()
    torch.testing.assert_close(layer(ngrams, counts, texts, 4), want, rtol=0, atol=1e-12)
    assert (want[2] == 0).all()


def test_edge_form_equals_fast_form():
    layer = votes()
    given = edges()

    def edge():
        with edge_form(layer):
            return layer(*given, 4)

    assert_same(layer, [], lambda: layer(*given, 4), edge)
    empty = (torch.empty(0, dtype=torch.long),) * 3
    with edge_form(layer):
        assert (layer(*empty, 2) == 0).all()
    assert (layer(*empty, 2) == 0).all() and repr(layer) == "NGramVotes(12, 2, scale=5.0)"


def test_order_of_the_edges_of_a_text_does_not_matter():
    layer = votes()
    ngrams, counts, texts = edges()
    perm = torch.tensor([2, 0, 1, 3, 6, 4, 5])
    torch.testing.assert_close(layer(ngrams[perm], counts[perm], texts[perm], 4), layer(*edges(), 4))


def test_weights_are_those_of_tfidf():
    vectorizer = pytest.importorskip("sklearn.feature_extraction.text").TfidfVectorizer
    hasher = TextHasher(4, 1 << 20, word_lengths=(1, 2), character_lengths=(30, 30))
    runs = vectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\S+")
    want = runs.fit_transform(TEXTS)
    hashed = [hasher(text) for text in TEXTS]
    layer = NGramVotes(1 << 20, 2, scale=1.0).double()
    layer.count(torch.from_numpy(document_frequency(hashed, 1 << 20)), len(hashed))
    batch = gather(hashed)
    parts = (torch.from_numpy(part) for part in (batch.ngrams, batch.counts, batch.texts))
    found = layer.edge_weight(*parts, len(TEXTS)).numpy()
    for number in range(len(TEXTS)):
        np.testing.assert_allclose(np.sort(found[batch.texts == number]), np.sort(want[number].data))


def test_dropout_leaves_edges_out_in_training_only():
    layer = votes(dropout=0.5)
    assert not torch.equal(layer(*edges(), 4), layer(*edges(), 4))
    layer.eval()
    assert torch.equal(layer(*edges(), 4), layer(*edges(), 4))


ARMS = [{}, {"num_slots": 0}, {"num_experts": 1}, {"num_hidden_layers": 2}]
ARMS += [{"num_slots": 0, "num_experts": 1, "budget_coef": 0}, {"num_ngrams": 0}]


@pytest.mark.parametrize("options", ARMS, ids=str)
def test_a_text_is_alone_in_its_batch(options):
    model = build(**options)
    ngrams = "num_ngrams" not in options
    with torch.no_grad():
        whole = model(**inputs(ngrams=ngrams)).logits
        for number, text in enumerate(TEXTS):
            alone = model(**inputs([text], ngrams=ngrams)).logits
            torch.testing.assert_close(alone[0], whole[number], rtol=0, atol=1e-12)
    assert whole.shape == (4, 3) and whole.std() > 0


@pytest.mark.parametrize("options", ARMS, ids=str)
def test_every_parameter_learns(options):
    model = build(max_position_embeddings=8, edge_floor=0.0, token_dropout=0.0, **options).train()
    labels = torch.tensor([0, 1, 2, 0])
    out = model(**inputs(ngrams="num_ngrams" not in options), labels=labels, output_records=True)
    assert len(out.layer_records) == options.get("num_hidden_layers", 1)
    assert len(out.records) == (0 if options.get("num_experts") == 1 else len(out.layer_records))
    assert_every_parameter_learns(model, out.loss)


def test_loss_is_the_sum_of_its_parts():
    model = build().train()
    labels = torch.tensor([0, 1, 2, 0])
    out = model(**inputs(), labels=labels)
    assert set(out.aux_losses) == {"balance", "budget"}
    want = out.task_loss + 0.01 * out.aux_losses["balance"] + 0.05 * out.aux_losses["budget"]
    torch.testing.assert_close(out.loss, want)
    model.eval()
    out = model(**inputs(), labels=labels)
    torch.testing.assert_close(out.task_loss, torch.nn.functional.cross_entropy(out.logits.float(), labels))


def test_words_hear_earlier_ones_through_the_memory_only():
    """Two texts that differ in their first word: what the others become differs, but not without slots."""
    texts = ["bad and fine and long", "good and fine and long"]
    for slots, moved in ((5, True), (0, False)):
        model = build(num_slots=slots)
        with torch.no_grad():
            batch = inputs(texts, ngrams=False)
            words = model.model(**batch).last_hidden_state
        assert bool((words[0, 1:] - words[1, 1:]).abs().max() > 1e-6) == moved


def test_forward_moves_no_state():
    model = build()
    assert_eval_changes_nothing(model, lambda: model(**inputs(), labels=torch.tensor([0, 1, 2, 0])))


def test_saves_and_loads(tmp_path):
    model = build(word_ngrams=[1, 3], id2label={0: "x", 1: "y", 2: "z"})
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), graphmoe.load(tmp_path)):
        assert isinstance(loaded, MocaForSequenceClassification)
        assert loaded.config.word_ngrams == [1, 3] and loaded.config.id2label[2] == "z"
        assert torch.equal(loaded.votes.rarity, model.votes.rarity) and loaded.votes.rarity.std() > 0
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs()).logits, model(**inputs()).logits)


def test_initial_sizes():
    model = MocaForSequenceClassification(MocaTextConfig(**SIZES, num_labels=2))
    assert (model.votes.weight == 0).all() and (model.votes.rarity == 1).all()
    assert model.num_active_parameters() < sum(p.numel() for p in model.parameters())


def test_one_batch_overfits():
    model = build(dropout=0.0, token_dropout=0.0, label_smoothing=0.0).train()
    labels = torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        out = model(**inputs(), labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.task_loss < 0.05


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_labels": 1}, "num_labels: nothing to tell apart"),
        ({"num_ngrams": 3}, "num_ngrams: no two halves"),
        ({"ngram_scale": 0}, "ngram_scale: n-grams without weight"),
        ({"token_dropout": 1.0}, "token_dropout: no fraction"),
        ({"label_smoothing": -0.1}, "label_smoothing: no fraction"),
        ({"num_slots": -1}, "num_slots"),
    ],
)
def test_wrong_sizes(options, match):
    with pytest.raises(ConfigError, match=match):
        MocaForSequenceClassification(MocaTextConfig(**{**SIZES, "num_labels": 3, **options}))


def test_wrong_input():
    with pytest.raises(ConfigError, match="ngrams: edges do not fit the model"):
        build()(**inputs(ngrams=False))
    with pytest.raises(ConfigError, match="ngrams: edges do not fit the model"):
        build(num_ngrams=0)(**inputs())
    with pytest.raises(ConfigError, match="frequency: not one number for each n-gram"):
        build().votes.count(torch.ones(3, dtype=torch.long), 4)
