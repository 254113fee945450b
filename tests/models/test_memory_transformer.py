import copy

import pytest
import torch
from contract import assert_every_parameter_learns
from transformers import AutoConfig, AutoModel

import graphmoe
from graphmoe.errors import ConfigError, DataError
from graphmoe.models import MemoryTransformer, MemoryTransformerConfig, PrototypicalNetwork
from graphmoe.nn import edge_form

MODELS = [MemoryTransformer, PrototypicalNetwork]


def config(**changes) -> MemoryTransformerConfig:
    sizes = {"image_size": 16, "hidden_size": 8, "encoder_channels": 8, "num_slots": 12, "max_ways": 4}
    return MemoryTransformerConfig(**sizes | changes)


def build(kind=MemoryTransformer, **changes):
    """A model whose batch norm has seen something, in eval mode."""
    model = kind(config(**changes))
    model(torch.rand(4, 8, 1, 16, 16), torch.zeros(4, 8, dtype=torch.long))
    return model.eval()


def episode(batch: int = 2, queries: int = 5):
    labels = torch.arange(4).repeat(batch, 2)  # [B, 8]
    asked = torch.randint(0, 4, (batch, queries))
    return torch.rand(batch, 8, 1, 16, 16), labels, torch.rand(batch, queries, 1, 16, 16), asked


@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_the_cross_entropy_of_queries(kind):
    model = build(kind)
    out = model(*episode())
    assert out.logits.shape == (2, 5, 4) and out.loss.isfinite() and torch.equal(out.loss, out.task_loss)
    images, labels, query, asked = episode()
    out = model(images, labels, query, asked)
    log_p = out.logits.log_softmax(-1)
    wanted = -torch.stack([log_p[b, q, asked[b, q]] for b in range(2) for q in range(5)]).mean()
    torch.testing.assert_close(out.loss, wanted)
    assert model(images, labels, query).loss is None


def test_logits_of_the_memory_are_log_probabilities():
    logits = build()(*episode()).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("queried", [True, False])
def test_edge_form_equals_fast_form(queried, double):
    model = build()
    images, labels, query, asked = episode()
    rest = (query, asked) if queried else ()
    fast = model(images, labels, *rest, output_attention=True)
    with edge_form(model):
        edge = model(images, labels, *rest, output_attention=True)
    for name in ("loss", "logits", "attention"):
        torch.testing.assert_close(fast[name], edge[name], rtol=1e-10, atol=1e-10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(out.loss, parameters) for out in (fast, edge)]
    for name, a, b in zip(names, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_an_example_that_is_told_by_the_others_is_as_good_as_a_query(kind, double):
    model = build(kind)
    images, labels, _, _ = episode(1)
    out = model(images, labels)
    for n in range(8):
        others = [m for m in range(8) if m != n]
        alone = model(images[:, others], labels[:, others], images[:, n : n + 1])
        torch.testing.assert_close(out.logits[:, n : n + 1], alone.logits, rtol=1e-9, atol=1e-9)


def test_prototypes_are_means(double):
    model = build(PrototypicalNetwork)
    images, labels, query, _ = episode(1)
    support, asked = model.encode(images)[0], model.encode(query)[0]
    logits = model(images, labels, query).logits[0]
    for q in range(5):
        for c in range(4):
            mean = support[labels[0] == c].mean(0)
            torch.testing.assert_close(logits[q, c], -(asked[q] - mean).pow(2).sum() / 8**0.5)


@pytest.mark.parametrize("kind", MODELS)
def test_neither_order_nor_names_of_labels_matter(kind, double):
    model = build(kind)
    images, labels, query, _ = episode()
    wanted = model(images, labels, query).logits
    order, name = torch.randperm(8), torch.tensor([2, 0, 3, 1])
    shuffled = model(images[:, order], labels[:, order], query).logits
    torch.testing.assert_close(shuffled, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(images, name[labels], query).logits[..., name], wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_episodes_know_nothing_of_one_another_in_eval(kind, double):
    model = build(kind)
    images, labels, query, _ = episode(3)
    before = copy.deepcopy(model.state_dict())
    whole = model(images, labels, query).logits
    alone = model(images[1:2], labels[1:2], query[1:2]).logits
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-11, atol=1e-11)
    few = model(images, labels, query[:, :1]).logits
    torch.testing.assert_close(few, whole[:, :1], rtol=1e-11, atol=1e-11)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_label_that_the_episode_lacks_is_never_the_answer(kind):
    images, labels, query, _ = episode()
    logits = build(kind)(images, labels % 3, query).logits
    assert logits.isfinite().all() and (logits[..., 3] < logits[..., :3].min() - 10).all()


@pytest.mark.parametrize("encoder", ["conv", "patch"])
def test_every_parameter_learns(encoder):
    model = build(encoder=encoder).train()
    images, labels, query, asked = episode()
    assert_every_parameter_learns(model, model(images, labels, query, asked).loss)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("encoder", ["conv", "patch"])
def test_saved_and_loaded(kind, encoder, tmp_path):
    model = build(kind, encoder=encoder)
    model.save_pretrained(tmp_path)
    arguments = episode()
    for loaded in (graphmoe.load(tmp_path), kind.from_pretrained(tmp_path).eval()):
        assert type(loaded) is kind
        assert torch.equal(loaded(*arguments).logits, model(*arguments).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MemoryTransformerConfig)
    if kind is MemoryTransformer:
        assert type(AutoModel.from_pretrained(tmp_path)) is kind


def test_a_fresh_model_starts_as_plain_attention_by_distance():
    model = MemoryTransformer(config())
    memory = model.memory
    assert torch.equal(memory.recall_conv.lin_query.weight, torch.eye(8))
    assert torch.equal(memory.write_conv.lin_update.weight, torch.eye(8))
    assert memory.recall_conv.log_temperature == 0 and (memory.gate.bias == 4).all()
    assert 0.2 < model.encoder.convs[1].weight.std() / (2 / (8 * 9)) ** 0.5 < 1.5


def test_a_few_steps_teach_it_to_look_at_the_right_slots():
    torch.manual_seed(1)
    model = MemoryTransformer(config()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    patterns = (torch.rand(4, 1, 16, 16) > 0.5).float()

    def batch(count: int):
        labels = torch.randint(0, 4, (count, 10))
        return patterns[labels] * 0.5 + 0.5 * torch.rand(count, 10, 1, 16, 16), labels

    def share(model) -> tuple[float, float]:
        """Attention to slots of the right label, and what uniform attention would give them."""
        images, labels = batch(20)
        known = torch.arange(4).repeat(20, 2)
        support = patterns[known] * 0.5 + 0.5 * torch.rand(20, 8, 1, 16, 16)
        with torch.no_grad():
            attention = model.eval()(support, known, images, output_attention=True).attention[..., :8]
        same = (known.unsqueeze(1) == labels.unsqueeze(2)).float()
        model.train()
        return (attention * same).sum(-1).mean().item(), same.mean().item()

    for _ in range(25):
        loss = model(*batch(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, uniform = share(model)
    assert uniform == pytest.approx(0.25) and found > 0.7


def test_wrong_input():
    model = build()
    images, labels, query, _ = episode()
    with pytest.raises(DataError, match=r"images: images of another size; expected \[\*, \(1, 16, 16\)\]"):
        model(images[..., :15], labels)
    with pytest.raises(ConfigError, match="num_slots: more examples than the memory has room for"):
        model(images.repeat(1, 2, 1, 1, 1), labels.repeat(1, 2), query)
    for changes, what in (
        ({"encoder": "mlp"}, "encoder: unknown encoder; expected one of conv, patch"),
        ({"image_size": 15}, "image_size: too small; expected at least 16; got 15"),
        ({"num_slots": 0}, "num_slots: too small"),
        ({"encoder": "patch", "patch_size": 5}, "patch_size: does not divide image_size"),
        ({"encoder": "patch", "num_attention_heads": 3}, "num_attention_heads: does not divide"),
    ):
        with pytest.raises(ConfigError, match=what):
            config(**changes)
