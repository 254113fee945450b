"""What the memories of a language model did: records of every block, and the loss of uneven slots."""

import pytest
import torch
from tiny_model import SIZES, tiny_model

from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig

LAYERS = SIZES["num_hidden_layers"]
SLOTS = 5


def build(**options):
    options = {"num_memory_slots": SLOTS, "num_memory_heads": 2, "num_experts_per_tok": 2, **options}
    return tiny_model(**options).double()


def ids(*shape):
    return torch.randint(SIZES["vocab_size"], shape)


@pytest.mark.parametrize(
    "options", [{}, {"num_experts": 1, "num_experts_per_tok": 1}], ids=["mixture", "dense"]
)
def test_every_block_tells_what_its_memory_did(options):
    model, tokens = build(**options).eval(), ids(2, 7)
    out = model(tokens, output_records=True)
    assert len(out.memory_records) == LAYERS
    assert len(out.records) == (0 if options else LAYERS)
    for record in out.memory_records:
        assert record.routing.logits.shape == (14, SLOTS) and record.gate.shape == (14,)
        assert int(record.routing.ptr[-1]) == 14 * 2
    assert model(tokens).memory_records is None
    assert build(num_memory_slots=0).eval()(tokens, output_records=True).memory_records == ()


def test_the_loss_balances_slots():
    model, tokens = build(memory_aux_loss_coef=0.5).train(), ids(2, 7)
    out = model(tokens, labels=tokens, output_records=True)
    value = out.aux_losses["memory_balance"]
    want = []
    for record in out.memory_records:
        share = record.routing.ptr.diff() / record.routing.ptr[-1]
        want.append(SLOTS * (share * record.routing.logits.softmax(dim=-1).mean(dim=0)).sum())
    torch.testing.assert_close(value, torch.stack(want).mean())
    others = build(memory_aux_loss_coef=0.0).train()
    others.load_state_dict(model.state_dict())
    plain = others(tokens, labels=tokens)
    assert "memory_balance" not in plain.aux_losses
    torch.testing.assert_close(out.loss - plain.loss, 0.5 * value)
    value.backward()
    for layer in model.model.layers:
        assert layer.memory.router.weight.grad.abs().max() > 0
        assert layer.attend.lin_out.weight.grad is not None


def test_a_step_of_the_loss_evens_slots_out():
    model, tokens = build().train(), ids(4, 16)
    for layer in model.model.layers:  # nearly everything goes to one slot
        torch.nn.init.ones_(layer.memory.router.weight[:1])
    before = model(tokens, labels=tokens).aux_losses["memory_balance"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens, labels=tokens).aux_losses["memory_balance"].backward()
        optimizer.step()
    assert model(tokens, labels=tokens).aux_losses["memory_balance"] < before


def test_padding_neither_counts_nor_costs():
    model, tokens = build().eval(), ids(3, 6)
    want = model(tokens, labels=tokens).aux_losses["memory_balance"]
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 6)], dim=1).long()
    labels = padded.masked_fill(mask == 0, -100)
    out = model(padded, attention_mask=mask, labels=labels, output_records=True)
    torch.testing.assert_close(out.aux_losses["memory_balance"], want)
    assert all(int(record.routing.ptr[-1]) == 3 * 6 * 2 for record in out.memory_records)


@pytest.mark.parametrize("policy", ["ffn", "block"])
def test_recomputed_blocks_keep_their_records(policy):
    model, tokens = build().train(), ids(2, 7)
    found = []
    for chosen in ("none", policy):
        model.config.checkpoint_policy = chosen
        model.zero_grad()
        out = model(tokens, labels=tokens, output_records=True)
        out.loss.backward()
        found.append(
            (out.aux_losses["memory_balance"], model.model.layers[0].memory.router.weight.grad.clone())
        )
        assert len(out.memory_records) == LAYERS
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after)


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ConfigError, match="memory_aux_loss_coef: negative weight of a loss"):
        GraphMoEConfig(memory_aux_loss_coef=-0.1)
