import pytest
import torch
from contract import assert_every_parameter_learns

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.models import DNCConfig, DNCForSequencePrediction, LSTMConfig, LSTMForSequencePrediction
from graphmoe.models.lstm import lstm_of_size
from graphmoe.models.sequence_prediction import UNSCORED
from graphmoe.nn import edge_form
from graphmoe.nn.memory.dnc_memory import parse_interface

SMALL = {"input_size": 3, "output_size": 2, "hidden_size": 8}
MODELS = {
    "dnc": lambda: DNCForSequencePrediction(DNCConfig(**SMALL, num_slots=5, slot_size=4, num_read_heads=2)),
    "lstm": lambda: LSTMForSequencePrediction(LSTMConfig(**SMALL, num_hidden_layers=2)),
}
both = pytest.mark.parametrize("name", MODELS)


def batch():
    labels = torch.randint(0, 2, (4, 6, 2)).float()
    labels[:, :3] = UNSCORED
    return {"input_values": torch.randn(4, 6, 3), "labels": labels}


@both
def test_saved_and_loaded(name, tmp_path):
    model, inputs = MODELS[name](), batch()
    model.save_pretrained(tmp_path)
    loaded = graphmoe.load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@both
def test_every_parameter_learns_and_one_batch_is_learned(name):
    model, inputs = MODELS[name](), batch()
    assert_every_parameter_learns(model, model(**inputs).loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@both
def test_loss_counts_only_what_is_asked(name, double):
    model, inputs = MODELS[name]().double(), batch()
    out = model(**inputs)
    probability = torch.sigmoid(out.logits[:, 3:])
    truth = inputs["labels"][:, 3:]
    picked = torch.where(truth > 0.5, probability, 1 - probability)
    torch.testing.assert_close(out.loss, -picked.log().mean())
    nothing = torch.full_like(inputs["labels"], UNSCORED)
    assert model(inputs["input_values"], labels=nothing).loss == 0
    assert model(inputs["input_values"]).loss is None


@both
def test_a_sequence_in_parts(name, double):
    model, x = MODELS[name]().double(), torch.randn(2, 7, 3)
    whole = model(x)
    first = model(x[:, :4])
    second = model(x[:, 4:], state=first.state)
    parts = torch.cat((first.logits, second.logits), dim=1)
    torch.testing.assert_close(parts, whole.logits, rtol=1e-12, atol=1e-12)


@both
def test_starts_to_remember(name):
    model = MODELS[name]()
    bias = model.cell.lin_input.bias if name == "dnc" else model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    assert (bias[8:16] == 1).all() and not bias[:8].any() and not bias[16:].any()


def test_gates_start_where_the_config_says():
    config = DNCConfig(**SMALL, slot_size=4, num_read_heads=2, content_bias=2.0, write_bias=3.0)
    plain, model = MODELS["dnc"](), DNCForSequencePrediction(config)
    assert not plain.cell.lin_interface.bias.any()
    bias = model.cell.lin_interface.bias
    assert torch.equal(bias, model.cell.interface_start())
    model.cell.reset_parameters()  # a cell by itself starts the same
    assert torch.equal(bias, model.cell.interface_start())
    told = parse_interface(bias[None], 2, 4)
    for gate in (told.allocation_gate, told.write_gate):
        torch.testing.assert_close(gate, torch.sigmoid(torch.full((1, 1), 3.0)))
    torch.testing.assert_close(told.modes, torch.softmax(torch.tensor([[[0.0, 2, 0]] * 2]), dim=-1))
    assert (told.free_gates == 0.5).all()
    assert not told.read_keys.any() and not told.vector.any() and (told.erase == 0.5).all()


def test_answers_start_from_what_was_read():
    model, x = MODELS["dnc"](), torch.randn(2, 3, 3)
    assert model.output.weight[:, :8].any() and not model.output.weight[:, 8:].any()
    state = model(x).state
    reads = state.reads @ model.output.weight[:, :8].t() + model.output.bias
    torch.testing.assert_close(model(x).logits[:, -1], reads)


def test_slots_are_no_parameter():
    model, x = MODELS["dnc"](), torch.randn(2, 9, 3)
    more = model(x, num_slots=20)
    assert more.state.memory.shape == (2, 20, 4) and model(x).state.memory.shape == (2, 5, 4)


def test_states_over_time_and_edge_form(double):
    model, x = MODELS["dnc"]().double(), torch.randn(2, 5, 3)
    plain, shown = model(x), model(x, output_states=True)
    assert len(shown.states) == 5 and shown.allocates.shape == (5, 2, 1)
    torch.testing.assert_close(shown.logits, plain.logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(shown.states[-1].memory, shown.state.memory)
    with edge_form(model):
        torch.testing.assert_close(model(x).logits, plain.logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("parameters", [500, 10_000, 28_368])
def test_lstm_of_equal_size(parameters):
    config = lstm_of_size(9, 8, parameters)
    found = sum(p.numel() for p in LSTMForSequencePrediction(config).parameters())
    assert abs(found - parameters) <= 4 * (9 + 2 * config.hidden_size + 3) + 8


@pytest.mark.parametrize("config", [DNCConfig, LSTMConfig])
def test_sizes_below_one(config):
    with pytest.raises(ConfigError, match="hidden_size"):
        config(hidden_size=0)
