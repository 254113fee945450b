"""Collaborating experts from the outside: both versions train, decode with other knobs, resume and refuse."""

import dataclasses
import json
import shutil

import pytest
import torch
from command_line import SMALL, losses, run

import graphmoe
from graphmoe import checkpoint
from graphmoe.data import TokenWindows, load_text
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig
from graphmoe.nn import CollabConv, ContextualRouter, IterativeExpert
from graphmoe.train.evaluate import window_losses
from recipes.language_model_config import LanguageModelConfig, build_model
from recipes.moc_context_lm import MocContextConfig
from recipes.moc_lm import MocConfig

NOISE = ["--router_noise_std=0.3", "--collab_dropout=0.2", "--dropout=0.1", "--capacity_factor=1.0"]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, *NOISE, "--dataset", corpus, "--out_dir", out, "--max_steps=6", "--save_every=3"]
    assert run("moc_lm", *flags, "--overwrite") == 0
    return out / "moc_lm"


def test_what_a_run_leaves(finished):
    plots = {path.stem for path in (finished / "plots").iterdir()}
    assert plots >= {
        "collaboration_attention", "expert_coactivation", "mediator_gate", "drop_rate", "inference_knobs"
    }  # fmt: skip
    result = json.loads((finished / "result.json").read_text())
    assert set(result["metrics"]) == {"bits_per_byte", "perplexity", "loss", "tokens_per_second"}
    assert set(result["experts"]) >= {"drop_rate", "drop_rate_random", "mediator_gate", "load_entropy"}
    assert all(0 < value < 1 for value in result["experts"]["mediator_gate"])
    assert max(result["experts"]["drop_rate"]) > 0  # a capacity of the mean load drops whatever exceeds it
    record = checkpoint.read(finished)
    assert record.records["final_inference_trained"].tolist() == [2, 2]
    layer = graphmoe.load(finished).moe_layers()[0]
    assert isinstance(layer.couplers[0], CollabConv) and isinstance(layer.experts, IterativeExpert)
    assert (layer.couplers[0].rounds, layer.experts.steps, layer.k, layer.num_experts) == (2, 2, 2, 8)


def test_the_first_version_hears_every_expert(corpus, tmp_path):
    flags = [*SMALL, "--dataset", corpus, "--out_dir", tmp_path, "--max_steps=2", "--sample=def f("]
    assert run("moc_context_lm", *flags) == 0
    result = json.loads((tmp_path / "moc_context_lm" / "result.json").read_text())
    assert result["sample"].startswith("def f(|") and "mediator_gate" not in result["experts"]
    model = graphmoe.load(tmp_path / "moc_context_lm")
    layer = model.moe_layers()[0]
    assert isinstance(layer.router, ContextualRouter) and not isinstance(layer.experts, IterativeExpert)
    assert (layer.couplers[0].rounds, layer.couplers[0].mediator, layer.k) == (1, None, 2)
    assert result["params_active"] == sum(p.numel() for p in model.parameters())
    first = next(
        row for row in checkpoint.read(tmp_path / "moc_context_lm").metrics if row["kind"] == "train"
    )
    assert set(first["aux"]) == {"balance", "router_z", "diversity"} and first["aux"]["diversity"] < 0


def evaluated(capsys, finished, *flags):
    """What ``--evaluate`` prints, by the first word of each line."""
    assert run("moc_lm", "--evaluate", finished, *flags) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


def test_rounds_and_steps_can_be_fewer_when_scoring(finished, corpus, capsys):
    loss = json.loads((finished / "result.json").read_text())["metrics"]["loss"]
    assert evaluated(capsys, finished)["model"].startswith(f"loss {loss:.4f}, ")
    trained = evaluated(capsys, finished, "--decode_rounds=2", "--decode_steps=2")
    assert trained["model"].startswith(f"loss {loss:.4f}, ")
    text, model = load_text(corpus, tokenizer="bytes"), graphmoe.load(finished)
    windows = TokenWindows(text.held_out, 32).sequential()
    for rounds, steps in ((0, 2), (1, 1)):
        sums = window_losses(model, windows, collab_rounds=rounds, reasoning_steps=steps)
        fewer = evaluated(capsys, finished, f"--decode_rounds={rounds}", f"--decode_steps={steps}")
        assert fewer["model"].startswith(f"loss {sums.sum().item() / windows[:, 1:].size:.4f}, ")
        assert not fewer["model"].startswith(f"loss {loss:.4f}, ")


def sampled(capsys, finished, *flags):
    assert run("moc_lm", "--evaluate", finished, "--sample=def f(", *flags) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_samples(finished, capsys):
    model, text = graphmoe.load(finished), load_text(__file__, tokenizer="bytes")
    ids = text.tokenizer("def f(", return_tensors="pt")["input_ids"]
    for flags, options in (
        ([], {}),
        (["--decode_rounds=0", "--decode_steps=1"], {"collab_rounds": 0, "reasoning_steps": 1}),
    ):
        greedy = sampled(capsys, finished, "--sample_temperature=0", *flags)
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256, **options)
        assert greedy == f"def f(|{text.tokenizer.decode(out[0, 6:].tolist())}"
    assert sampled(capsys, finished, "--sample_top_k=1", "--sample_temperature=3") == sampled(
        capsys, finished, "--sample_temperature=0"
    )
    assert sampled(capsys, finished, "--sample_top_p=1e-6") == sampled(
        capsys, finished, "--sample_temperature=0"
    )
    assert sampled(capsys, finished) == sampled(capsys, finished)
    assert sampled(capsys, finished, "--seed=1") != sampled(capsys, finished, "--seed=2")


def test_a_sample_is_never_longer_than_the_model_takes(finished, capsys):
    long = "x" * 31
    assert run("moc_lm", "--evaluate", finished, f"--sample={long}", "--sample_tokens=1000") == 0
    assert capsys.readouterr().out.startswith(f"{long}|")
    assert run("moc_lm", "--evaluate", finished, f"--sample={long}x") == 2
    error = capsys.readouterr().err
    assert "--sample: " in error and "expected 1 to 31 tokens, one less than --seq_len; got 32" in error


def test_resumed_is_never_stopped(finished, tmp_path):
    """With noise on the router, dropout and a capacity, from the middle, to equal weights."""
    shutil.copytree(finished, tmp_path / "moc_lm")
    shutil.rmtree(tmp_path / "moc_lm" / "step-00000006")
    (tmp_path / "moc_lm" / "result.json").unlink()
    assert run("moc_lm", "--resume", "--out_dir", tmp_path) == 0
    assert losses(tmp_path / "moc_lm") == losses(finished)
    a, b = (graphmoe.load(path).state_dict() for path in (finished, tmp_path / "moc_lm"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_flag_reaches_the_model():
    options = {
        "router": "contextual", "router_temperature": 0.5, "router_noise_std": 0.25, "capacity_factor": 1.5,
        "drop_penalty_coef": 0.125, "reasoning_steps": 3, "collab_heads": 2, "collab_dim": 24,
        "collab_mediator": False, "collab_graph": "self", "collab_dropout": 0.375, "diversity_coef": 0.0625,
        "coupling": "collab", "coupling_layers": 3, "fusion": "gated",
    }  # fmt: skip

    class Text:
        vocab_size, tokenizer = 17, None

    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "expert_dim": 8}
    config = LanguageModelConfig(**shape, **options, gradient_checkpointing="block")
    built = build_model(config, Text).config
    words = {"collab_dim": "collab_hidden_size"}
    assert {name: getattr(built, words.get(name, name)) for name in options} == options
    assert built.checkpoint_policy == "block"
    named = {words.get(f.name, f.name) for f in dataclasses.fields(LanguageModelConfig)}
    new = {"router", "capacity_factor", "reasoning_steps", "diversity_coef", "drop_penalty_coef"}
    new |= {name for name in GraphMoEConfig().to_dict() if name.startswith(("collab_", "router_"))}
    assert new <= named


@pytest.mark.parametrize(
    "words, coupling",
    [
        ({}, ("collab", 2, True)),
        ({"use_moc_collab": True}, ("collab", 2, True)),
        ({"use_moc_collab": True, "use_simple_collab": False}, ("collab", 2, True)),
        ({"use_moc_collab": False}, ("none", 2, True)),
        ({"use_moc_collab": False, "use_simple_collab": False}, ("none", 2, True)),
        ({"use_simple_collab": True}, ("collab", 1, False)),
        ({"use_simple_collab": True, "use_moc_collab": False}, ("collab", 1, False)),
        ({"use_simple_collab": True, "coupling_layers": 4}, ("collab", 1, False)),
    ],
)
def test_words_of_the_original_choose_the_collaboration(words, coupling):
    config = MocConfig(**words)
    assert (config.coupling, config.coupling_layers, config.collab_mediator) == coupling
    assert dataclasses.replace(config, coupling="collab", coupling_layers=5).coupling_layers == 5


@pytest.mark.parametrize(
    "switch, policy, meant",
    [
        (None, None, "none"),
        (None, "block", "block"),
        (True, None, "ffn"),
        (True, "block", "block"),
        (True, "none", "none"),
        (False, None, "none"),
        (False, "ffn", "none"),
    ],
)
def test_words_of_the_original_choose_what_is_computed_again(switch, policy, meant):
    config = LanguageModelConfig(use_gradient_checkpointing=switch, gradient_checkpointing=policy)
    assert config.checkpoint_policy == meant


def test_both_versions_are_what_they_say():
    one, two = MocContextConfig(), MocConfig()
    assert (one.router, one.coupling_layers, one.collab_mediator, one.reasoning_steps) == (
        "contextual", 1, False, 0,
    )  # fmt: skip
    assert (two.router, two.coupling_layers, two.collab_mediator, two.reasoning_steps) == ("topk", 2, True, 2)
    assert one.capacity_factor is None and two.capacity_factor is None
    silent = MocContextConfig(use_moc_collab=False)
    assert (silent.coupling, silent.diversity_coef) == ("none", 0)
    with pytest.raises(ConfigError, match="--use_simple_collab: two kinds of collaboration"):
        MocConfig(use_simple_collab=True, use_moc_collab=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_kv_heads=3"], "--num_kv_heads: key-value heads must divide the heads"),
        (["--capacity_factor=0"], "--capacity_factor: value cannot be used; expected a finite number > 0"),
        (["--top_k=9"], "--top_k: k must not exceed the number of experts; expected 1 <= k <= 8; got 9"),
        (["--collab_heads=3"], "--collab_heads: value cannot be used; expected a divisor of --embed_dim 16"),
        (["--collab_dim=0"], "--collab_dim"),
        (
            ["--collab_graph=ring"],
            "--collab_graph: unknown graph; expected one of complete, self; got 'ring'",
        ),
        (["--collab_dropout=1"], "--collab_dropout"),
        (["--coupling_layers=-1"], "--coupling_layers"),
        (["--coupling_norm"], "--coupling_norm: collaboration has norms of its own"),
        (["--fusion=sum"], "--fusion: nobody listens to the mediator"),
        (
            ["--router=best"],
            "--router: unknown router; expected one of topk, contextual, threshold, expert_choice; got",
        ),
        (["--router_temperature=0"], "--router_temperature"),
        (["--router_noise_std=-1"], "--router_noise_std"),
        (["--reasoning_steps=-1"], "--reasoning_steps"),
        (["--no_collab_mediator", "--diversity_coef=0.1", "--coupling=none"], "--diversity_coef"),
        (["--gradient_checkpointing=all"], "--gradient_checkpointing"),
        (["--use_moc_collab", "--use_simple_collab"], "--use_simple_collab: two kinds of collaboration"),
        (["--coupling=none", "--decode_rounds=1"], "--decode_rounds"),
        (["--reasoning_steps=0", "--decode_steps=1"], "--decode_steps"),
        (["--sample_temperature=-1"], "--sample_temperature"),
        (["--sample_top_p=0"], "--sample_top_p"),
        (["--final_windows=0"], "--final_windows"),
        (["--sample", "x" * 32], "--sample: no prompt that can be continued; expected 1 to 31 tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, corpus, tmp_path, capsys):
    code = run("moc_lm", *SMALL, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not (tmp_path / "runs").exists()
