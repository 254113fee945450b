"""Encoders and classifiers: nobody's business but the sequence's own."""

import pytest
import torch
from contract import assert_eval_changes_nothing, assert_every_parameter_learns
from tiny_model import SIZES
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

import graphmoe
from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.models import (
    GraphMoEConfig,
    GraphMoEForCausalLM,
    GraphMoEForSequenceClassification,
    GraphMoEModel,
)
from graphmoe.models.sequence_classification import pool
from graphmoe.nn import edge_form

ARMS = {
    "dense": {"num_experts": 1, "num_experts_per_tok": 1},
    "topk": {},
    "threshold": {"router": "threshold"},
    "expert_choice": {"router": "expert_choice"},
    "expert_choice_gnn": {"router": "expert_choice", "coupling": "gnn", "num_shared_experts": 1},
    "causal": {"is_causal": True},
}
LENGTHS = (7, 1, 5, 3)


def build(**options) -> GraphMoEForSequenceClassification:
    config = GraphMoEConfig(**{**SIZES, "is_causal": False, "num_labels": 3, **options})
    model = GraphMoEForSequenceClassification(config).double()
    for parameter in model.parameters():  # large weights: a leak must not hide in small numbers
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sequences() -> list[torch.Tensor]:
    return [torch.randint(31, (length,)) for length in LENGTHS]


def padded(rows: list[torch.Tensor], width: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(31, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, where], mask[place, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_batch_mates_and_padding_do_not_matter(arm):
    model, rows = build(**ARMS[arm]), sequences()
    alone = torch.cat([model(row.unsqueeze(0)).logits for row in rows])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    for width in (7, 12):
        for left in (False, True):
            together = model(**padded(rows, width, left=left)).logits
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    twice = model(**padded(rows * 8 + rows[:1], 9)).logits
    torch.testing.assert_close(twice[:4], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("arm", ARMS)
def test_every_token_counts_wherever_it_stands(arm):
    model, ids = build(**ARMS[arm]), torch.randint(31, (1, 6))
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    states = model.model(inputs_embeds=embeds).last_hidden_state
    first = torch.autograd.grad(states[0, 0].sum(), embeds)[0][0].abs().sum(dim=1)  # [T]
    assert first[0] > 0
    assert bool((first[1:] > 0).all()) is (arm != "causal")
    assert bool((first[1:] == 0).all()) is (arm == "causal")


@pytest.mark.parametrize("arm", ["topk", "expert_choice"])
def test_edge_form_equals_fast_form(arm):
    model, inputs = build(**ARMS[arm]), padded(sequences(), 8)
    labels = torch.tensor([0, 2, 1, 1])

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = model(**inputs, labels=labels)
        return out.logits.detach(), torch.autograd.grad(out.loss, list(model.parameters()))

    fast, fast_gradients = gradients()
    with edge_form(model):
        slow, slow_gradients = gradients()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    for one, other in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("arm", ARMS)
def test_a_sequence_of_padding_is_defined_and_disturbs_nobody(arm):
    model, rows = build(**ARMS[arm]).train(), sequences()
    with torch.no_grad():
        without = model(**padded(rows, 7)).logits
    inputs = padded([*rows, torch.empty(0, dtype=torch.long)], 7)
    out = model(**inputs, labels=torch.tensor([0, 2, 1, 1, -100]))
    torch.testing.assert_close(out.logits[:4], without, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.logits[4], model.classifier.bias)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_learns(arm):
    model = build(**ARMS[arm]).train()
    out = model(**padded(sequences() * 2, 8), labels=torch.tensor([0, 2, 1, 1] * 2))
    assert_every_parameter_learns(model, out.loss)


def test_forward_moves_no_state():
    inputs = padded(sequences(), 8)
    for arm in ("topk", "threshold", "expert_choice"):
        model = build(**ARMS[arm])
        assert_eval_changes_nothing(model, lambda model=model: model(**inputs))


def test_loss_is_that_of_the_task_and_of_the_experts():
    model, inputs = build(router_aux_loss_coef=0.02, router_z_loss_coef=0.003), padded(sequences(), 8)
    labels = torch.tensor([0, 2, 1, 1])
    out = model(**inputs, labels=labels, output_records=True, output_router_logits=True)
    torch.testing.assert_close(out.task_loss, F.cross_entropy(out.logits, labels))
    want = out.task_loss + 0.02 * out.aux_losses["balance"] + 0.003 * out.aux_losses["router_z"]
    torch.testing.assert_close(out.loss, want)
    present = int(inputs["attention_mask"].sum())
    assert [int(record.routing.ptr[-1]) for record in out.records] == [2 * present] * 2
    assert [scores.shape for scores in out.router_logits] == [(32, 4)] * 2
    # What stands in padding moves neither the loss of the task nor those of the experts.
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 5)}
    torch.testing.assert_close(model(**other, labels=labels).loss, out.loss, rtol=0, atol=1e-12)
    assert model(**inputs).loss is None


def test_experts_take_their_share_of_each_sequence():
    model, inputs = build(router="expert_choice"), padded(sequences(), 8)
    record = model(**inputs, output_records=True).records[0]
    live = int(record.routing.ptr[-1])
    sequence, expert = record.routing.token[:live] // 8, record.routing.expert[:live]
    served = torch.zeros(4, 4, dtype=torch.long).index_put_(
        (sequence, expert), torch.tensor(1), accumulate=True
    )
    # 2 experts a token, 4 experts: half of the tokens each, rounded up.
    assert served.tolist() == [[4] * 4, [1] * 4, [3] * 4, [2] * 4]


def test_pooling_is_a_mean_over_present_tokens():
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(pool(x, mask), torch.stack([x[0, :2].mean(0), torch.zeros(3)]))
    torch.testing.assert_close(pool(x, None), x.mean(dim=1))


@pytest.mark.parametrize("arm", ["topk", "expert_choice"])
def test_saves_and_loads(arm, tmp_path):
    def same(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    model, inputs = build(**ARMS[arm]), padded(sequences(), 8)
    model.save_pretrained(tmp_path / "plain")
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain"),
        GraphMoEForSequenceClassification.from_pretrained(tmp_path / "plain"),
        graphmoe.load(tmp_path / "plain"),
    ):
        assert type(loaded) is GraphMoEForSequenceClassification and loaded.config.num_labels == 3
        same(loaded.eval()(**inputs).logits, model(**inputs).logits)
    encoder = AutoModel.from_pretrained(tmp_path / "plain").eval()
    assert type(encoder) is GraphMoEModel
    same(encoder(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 1})
    same(graphmoe.load(tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("arm", ["dense", "topk", "expert_choice"])
def test_one_batch_overfits(arm):
    options = ARMS[arm] | {"hidden_size": 32, "intermediate_size": 32}
    config = GraphMoEConfig(**{**SIZES, "is_causal": False, "num_labels": 3, **options})
    model = GraphMoEForSequenceClassification(config)
    rows = [torch.randint(31, (length,)) for length in LENGTHS * 4]
    inputs, labels = (
        padded([torch.cat([torch.tensor([i]), row]) for i, row in enumerate(rows)], 8),
        torch.randint(3, (16,)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(**inputs, labels=labels).task_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = model.eval()(**inputs, labels=labels)
    assert out.task_loss < 0.02 and bool((out.logits.argmax(dim=1) == labels).all())


@pytest.mark.parametrize("arm", ["topk", "expert_choice"])
def test_gradient_checkpointing_gives_the_same_gradients(arm):
    inputs, labels = padded(sequences(), 8), torch.tensor([0, 2, 1, 1])
    found = []
    for policy in ("none", "ffn", "block"):
        torch.manual_seed(0)
        model = build(**ARMS[arm], checkpoint_policy=policy).train()
        model(**inputs, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_trace_has_the_edges_of_an_encoder():
    model, ids = build(), torch.randint(31, (2, 4))
    graph = graphmoe.trace(model, input_ids=ids)
    edges = graph["token", "attends", "token"]
    assert edges.edge_index.size(1) == 2 * 2 * 4 * 4  # layers, sequences, all pairs with loops
    assert graph["token"].num_nodes == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_labels": 1}, "num_labels: nothing to tell apart; expected at least 2; got 1"),
        ({"problem_type": "regression"}, "problem_type: another problem"),
        ({"is_causal": True, "router": "expert_choice"}, "router: experts.*see the future.*threshold"),
    ],
)
def test_wrong_configuration(options, message):
    with pytest.raises(ConfigError, match=message):
        GraphMoEForSequenceClassification(GraphMoEConfig(**{**SIZES, "is_causal": False, **options}))


def test_wrong_input():
    with pytest.raises(ConfigError, match="is_causal: a language model must not see"):
        GraphMoEForCausalLM(GraphMoEConfig(**SIZES, is_causal=False))
    with pytest.raises(
        ConfigError, match=r"router: experts that choose their tokens see the future.*threshold"
    ):
        GraphMoEForCausalLM(GraphMoEConfig(**SIZES, router="expert_choice"))
    model, ids = build(), torch.randint(31, (1, 4))
    with pytest.raises(ConfigError, match=r"attention_mask: no telling.*\[B, T\]"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    cache = GraphMoEForCausalLM(GraphMoEConfig(**SIZES)).eval()(ids).cache
    with pytest.raises(ConfigError, match="cache: tokens that look ahead"):
        model.model(ids, cache=cache)
    assert model.model(ids, use_cache=True).cache is None
