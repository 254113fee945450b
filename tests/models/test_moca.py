import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

import graphmoe
from graphmoe.data.copy_task import CopyTask
from graphmoe.errors import ConfigError
from graphmoe.models import MocaConfig, MocaForTokenPrediction
from tests.contract import assert_eval_changes_nothing, assert_every_parameter_learns

TASK = CopyTask(12, 2, 5)
SIZES = {
    "vocab_size": TASK.vocab_size, "hidden_size": 16, "intermediate_size": 16, "num_slots": 6,
    "max_position_embeddings": 6, "delimiter_token_id": TASK.delimiter, "num_hidden_layers": 2,
}  # fmt: skip
OPTIONS = {
    "default": {},
    "in turn": {"read_dependent_gate": True},
    "no memory": {"num_slots": 0, "collision_coef": 0.0},
    "no experts": {"num_experts": 1},
    "dense": {"num_slots_per_tok": 6, "num_experts_per_tok": 4},
    "plain": {"num_slots": 0, "num_experts": 1, "budget_coef": 0.0, "memory_binding": False},
}


def build(**options):
    return MocaForTokenPrediction(MocaConfig(**(SIZES | options)))


def batch(rows=4):
    return TASK.batch(0, rows, slice(0, rows))


@pytest.mark.parametrize("name", OPTIONS)
def test_contract(name):
    model, inputs = build(**OPTIONS[name]), batch()
    out = model(**inputs, output_records=True)
    assert out.logits.shape == (*inputs["input_ids"].shape, TASK.vocab_size)
    counts = inputs["labels"] != -100
    torch.testing.assert_close(out.task_loss, F.cross_entropy(out.logits[counts], inputs["labels"][counts]))
    weights = {"balance": 0.01, "collision": 0.02, "budget": 0.05}
    extra = sum(weights[n] * v for n, v in out.aux_losses.items())
    torch.testing.assert_close(out.loss, out.task_loss + extra)
    assert len(out.layer_records) == 2 and (out.records is None) is (model.config.num_experts == 1)
    assert_eval_changes_nothing(model, lambda: model(**inputs))
    assert_every_parameter_learns(model, out.loss + out.logits.square().mean())
    assert 0 < model.num_active_parameters() <= sum(p.numel() for p in model.parameters())


def test_a_place_starts_in_the_same_slots_in_all_phases():
    """Where nothing else differs: routers that send reads elsewhere than writes do not learn better."""
    model = build(num_hidden_layers=1)
    ids = torch.tensor([[3, 5, 4, TASK.delimiter, 3, 5, 4]])
    record = model(ids, output_records=True).layer_records[0].memory
    torch.testing.assert_close(record.routing.logits[:3], record.routing.logits[4:])
    assert model.model.phase.weight.abs().max() == 0
    assert AutoModel.from_config(model.config).phase.weight.abs().max() == 0
    assert build(num_phases=1, delimiter_token_id=None).model.phase.weight.abs().max() > 0


def test_losses_with_a_coefficient_of_0_are_absent():
    model = build(budget_coef=0.0, collision_coef=0.0, router_aux_loss_coef=0.0)
    out = model(**batch())
    assert out.aux_losses == {} and torch.equal(out.loss, out.task_loss)
    assert model.model.layers[0].budget is None
    nothing = batch()
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    assert model(**nothing).loss == 0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_going_on_from_a_state_is_one_long_sequence(name, cut, double):
    model, inputs = build(**OPTIONS[name]).double().eval(), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(ids, mask)
    first = model(ids[:, :cut], mask[:, :cut])
    second = model(ids[:, cut:], mask[:, cut:], state=first.state)
    joined = torch.cat([first.logits, second.logits], dim=1)
    present = mask.bool()
    torch.testing.assert_close(joined[present], whole.logits[present], rtol=1e-12, atol=1e-12)
    assert torch.equal(second.state.position, whole.state.position)
    assert torch.equal(second.state.phase, whole.state.phase)


@pytest.mark.parametrize("name", ["default", "in turn"])
def test_no_token_sees_the_future_or_another_sequence(name, double):
    model = build(**OPTIONS[name]).double().eval()
    ids = torch.randint(1, 13, (3, 9))
    ids[:, 4] = TASK.delimiter
    before = model(ids).logits
    ids[:, 6:] = TASK.blank
    ids[2] = 3
    ids[2, 4] = TASK.delimiter
    after = model(ids).logits
    torch.testing.assert_close(after[:2, :6], before[:2, :6], rtol=1e-12, atol=1e-12)
    assert (after[:2, 6:] - before[:2, 6:]).abs().max() > 1e-6
    torch.testing.assert_close(model(ids[:1]).logits, after[:1], rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing(double):
    model = build().double().eval()
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(ids, mask).logits
    for row, present, logits in zip(ids, mask.bool(), whole, strict=True):
        torch.testing.assert_close(model(row[present][None]).logits[0], logits[present])
    left = F.pad(ids, (3, 0)), F.pad(mask, (3, 0))
    present = mask.bool()
    torch.testing.assert_close(model(*left).logits[:, 3:][present], whole[present], rtol=1e-12, atol=1e-12)


def test_places_begin_again_behind_a_delimiter():
    model = build(num_phases=3).model
    d = TASK.delimiter
    ids = torch.tensor([[0, 5, 5, d, 7, d, 8, 8, 8]])
    position, phase, last = model._places(ids, ids > 0, None)
    assert position.tolist() == [[0, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert phase.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert [t.tolist() for t in last] == [[3], [2]]


def test_save_and_load(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    inputs = batch()
    want = model(**inputs).logits
    assert torch.equal(graphmoe.load(tmp_path)(**inputs).logits, want)
    base = AutoModel.from_pretrained(tmp_path)
    hidden = base(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    present = inputs["attention_mask"].bool()
    torch.testing.assert_close(model.head(hidden)[present], want[present])


def test_one_batch_can_be_learned():
    model, inputs = build(num_hidden_layers=1), batch(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = float(model(**inputs).task_loss.detach())
    for _ in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(model(**inputs).task_loss.detach()) < 0.5 < 2 < first


def test_wrong_input():
    model = build()
    with pytest.raises(
        ConfigError, match=r"max_position_embeddings: more than the model was made for.*at most 6; got 7"
    ):
        model(torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"num_phases: more than the model was made for.*at most 2; got 3"):
        model(torch.tensor([[TASK.delimiter, TASK.delimiter, 1]]))
    with pytest.raises(ConfigError, match="hidden_size: too small"):
        MocaConfig(hidden_size=0)
    with pytest.raises(ConfigError, match="num_slots: negative number of slots"):
        MocaConfig(num_slots=-1)
    with pytest.raises(ConfigError, match="collision_coef: negative weight of a loss"):
        MocaConfig(collision_coef=-1.0)
    with pytest.raises(ConfigError, match="budget_coef: nothing is routed"):
        MocaConfig(num_slots=0, num_experts=1)
