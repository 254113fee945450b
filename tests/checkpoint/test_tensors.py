"""Tensors of a model and its optimiser: bit-exact or refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from graphmoe import checkpoint, load
from graphmoe.errors import CheckpointError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


class Net(nn.Module):
    """Tied weights, a bf16 parameter, a frozen one, and buffers of several dtypes and of no element."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.zeros(2, 3, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("window", torch.zeros(2, 2), persistent=False)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))) * self.scale)


def update(model, optimizer, step):
    torch.manual_seed(step)
    x = torch.randint(7, (5, 3))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.count += step
    model.mean.copy_(torch.randn(4))
    model.mask[step % 3] = True
    return loss.item()


def make(seed=0, kind="adamw"):
    torch.manual_seed(seed)
    model = Net()
    return model, OPTIMIZERS[kind](model.parameters())


def save(run, step, model=None, **kwargs):
    model, optimizer = model or make()
    if not optimizer.state:
        update(model, optimizer, step)
    kwargs.setdefault("state", {"step": step})
    return checkpoint.save(run, step, model=model, optimizer=optimizer, **kwargs)


def bits(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    slots = {f"{names[p]}/{k}": v for p, d in optimizer.state.items() for k, v in d.items()}
    return {k: (v.dtype, v.contiguous().view(-1).view(torch.uint8).tolist()) for k, v in slots.items()} | {
        k: (v.dtype, v.view(-1).view(torch.uint8).tolist()) for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_run_goes_on_with_the_same_bits(tmp_path, kind):
    model, optimizer = make(0, kind)
    for step in range(3):
        update(model, optimizer, step)
    step_dir = save(tmp_path, 3, (model, optimizer), state={"step": 3, "lr": 0.1 + 0.2})

    twin, twin_optimizer = make(1, kind)
    update(twin, twin_optimizer, 9)
    state = checkpoint.restore(step_dir, model=twin, optimizer=twin_optimizer)
    assert state == {"step": 3, "lr": 0.1 + 0.2}
    assert bits(twin, twin_optimizer) == bits(model, optimizer)
    assert twin.head.weight is twin.embed.weight
    for step in range(3, 6):
        assert update(twin, twin_optimizer, step) == update(model, optimizer, step)
    assert bits(twin, twin_optimizer) == bits(model, optimizer)


def test_restored_state_owns_its_memory(tmp_path, tree):
    step_dir = save(tmp_path, 1)
    before = tree(step_dir)
    model, optimizer = make(1)
    checkpoint.restore(step_dir, model=model, optimizer=optimizer)
    update(model, optimizer, 1)
    assert tree(step_dir) == before


@pytest.mark.parametrize(
    "option, place", [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")]
)
def test_state_goes_to_the_device_of_its_parameter(tmp_path, option, place):
    model = Net().to("meta")  # stands in for an accelerator: it is any device other than the CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(option)
    checkpoint.restore(save(tmp_path, 1), model=model, optimizer=optimizer)
    slots = optimizer.state[model.mix.bias]
    assert slots["exp_avg"].device.type == slots["exp_avg_sq"].device.type == "meta"
    assert slots["step"].device.type == place


def test_transformers_model_round_trip(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **sizes))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def learn(model, optimizer):
        ids = torch.arange(10)[None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = build(0)
    learn(model, optimizer)
    step_dir = save(tmp_path, 1, (model, optimizer))
    checkpoint.verify(step_dir)
    twin, twin_optimizer = build(1)
    checkpoint.restore(step_dir, model=twin, optimizer=twin_optimizer)
    loaded = LlamaForCausalLM.from_pretrained(step_dir)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert [learn(twin, twin_optimizer) for _ in range(2)] == [learn(model, optimizer) for _ in range(2)]


def test_plain_numbers_in_optimizer_state(tmp_path):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["calls"] = self.state[parameter].get("calls", 0) + 1

    model, twin = Net(), Net()
    optimizer, other = (Counting(m.parameters(), lr=0.1) for m in (model, twin))
    update(model, optimizer, 0)
    checkpoint.restore(save(tmp_path, 1, (model, optimizer)), model=twin, optimizer=other)
    assert [s["calls"] for s in other.state.values()] == [s["calls"] for s in optimizer.state.values()]
    optimizer.state[model.mix.bias]["calls"] = object()
    with pytest.raises(CheckpointError, match=r"mix\.bias/calls: .*neither a tensor nor a number"):
        save(tmp_path, 2, (model, optimizer))


def test_shared_memory_is_written_once(tmp_path):
    step_dir = save(tmp_path, 1)
    weights = load_file(step_dir / "model.safetensors")
    assert "embed.weight" in weights and "head.weight" not in weights and "window" not in weights
    assert "mix.bias/exp_avg_sq" in load_file(step_dir / "optimizer.safetensors")


def edit(path, change, metadata=None):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


META = {"optimizer": "AdamW", "numbers": "{}"}


@pytest.mark.parametrize(
    "file, change, match",
    [
        ("model", lambda t: t.pop("mix.bias"), "tensor mix.bias is missing"),
        ("model", lambda t: t.pop("count"), "tensor count is missing"),
        ("model", lambda t: t.pop("embed.weight"), "tensor embed.weight is missing"),
        ("model", lambda t: t.update(extra=torch.ones(1)), "tensor extra is not in the model"),
        (
            "model",
            lambda t: t.update(mean=torch.ones(5).bfloat16()),
            r"mean has another shape; expected \[4\]; got \[5\]",
        ),
        ("model", lambda t: t.update(mean=torch.ones(4)), "mean has another dtype; expected torch.bfloat16"),
        ("optimizer", lambda t: t.update({"x/exp_avg": torch.ones(1)}), "x/exp_avg belongs to no parameter"),
        ("optimizer", lambda t: t.update({"exp_avg": torch.ones(1)}), "exp_avg belongs to no parameter"),
        (
            "optimizer",
            lambda t: t.update({"mix.bias/exp_avg": torch.ones(5)}),
            "mix.bias/exp_avg has another shape",
        ),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tmp_path, file, change, match):
    step_dir = save(tmp_path, 1)
    edit(step_dir / f"{file}.safetensors", change, META)
    model, optimizer = make(1)
    update(model, optimizer, 0)
    before = bits(model, optimizer)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.restore(step_dir, model=model, optimizer=optimizer)
    assert bits(model, optimizer) == before


def test_state_of_another_optimizer(tmp_path):
    model, optimizer = make(0, "momentum")
    with pytest.raises(CheckpointError, match="another optimizer; expected SGD; got 'AdamW'"):
        checkpoint.restore(save(tmp_path, 1), model=model, optimizer=optimizer)
    optimizer.state[torch.ones(1)] = {"step": torch.ones(1)}
    with pytest.raises(CheckpointError, match="no parameter of the model"):
        save(tmp_path, 2, (model, optimizer))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, b"\x80\x04K\x01.", None], ids=["empty", "ff", "pickle", "absent"]
)
def test_unreadable_files_are_typed_errors(tmp_path, name, data):
    step_dir = save(tmp_path, 1)
    (step_dir / name).unlink()
    if data is not None:
        (step_dir / name).write_bytes(data)
    model, optimizer = make()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        checkpoint.restore(step_dir, model=model, optimizer=optimizer)


@pytest.mark.parametrize("step", [None, True, 1.0, "1", [1]])
def test_state_without_a_step_changes_nothing(tmp_path, step):
    step_dir = save(tmp_path, 1, state={} if step is None else {"step": step})
    model, optimizer = make(1)
    before = bits(model, optimizer)
    with pytest.raises(CheckpointError, match=r"state\.json: state has no step; expected an integer"):
        checkpoint.restore(step_dir, model=model, optimizer=optimizer)
    assert bits(model, optimizer) == before


def test_models_whose_older_files_have_other_names_go_on(tmp_path):
    config = ViTConfig(
        image_size=4,
        patch_size=2,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model, other = ViTForImageClassification(config), ViTForImageClassification(config)
    optimizer = torch.optim.SGD(model.parameters())
    step_dir = checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, state={"step": 1})
    checkpoint.restore(step_dir, model=other)
    loaded = load(step_dir)
    assert type(loaded) is ViTForImageClassification
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]) and torch.equal(
            weight, loaded.state_dict()[name]
        )
