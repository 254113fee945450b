"""Few-shot runs: what they leave, resuming, scoring again, and what they refuse before training."""

import json

import numpy as np
import pytest
import torch
from command_line import losses, run

from graphmoe import checkpoint, load
from graphmoe.data.few_shot import as_ink, distort
from graphmoe.models import MemoryTransformer, PrototypicalNetwork
from recipes import few_shot
from recipes.few_shot_config import SCORED_SEED, FewShotConfig, read_characters
from recipes.few_shot_scores import embed, reading, score

SMALL = [
    *("--max_steps=5", "--train_ways=6", "--encoder_dim=8", "--embed_dim=8", "--num_slots=30"),
    *(
        "--ways",
        "5",
        "--shots",
        "1",
        "5",
        "--episodes=40",
        "--eval_episodes=5",
        "--eval_every=5",
        "--views=2",
    ),
    *("--save_every=2", "--log_every=1", "--num_threads=1", "--device=cpu", "--dataset=glyphs"),
]
KINDS = ("accuracy_5w1s", "accuracy_5w5s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("few_shot", *SMALL, "--out_dir", out) == 0
    return out / "few_shot"


def test_a_run_leaves_its_scores_beside_their_references(finished):
    result = json.loads((finished / "result.json").read_text())
    for part in ("metrics", "standard_error", "baseline", "baseline_error", "pixels", "chance"):
        assert all(0 <= result[part][kind] <= 1 for kind in KINDS), part
    assert result["chance"] == dict.fromkeys(KINDS, 0.2)
    assert result["metrics"]["accuracy_5w1s"] > 0.3 and result["pixels"]["accuracy_5w5s"] > 0.8
    assert result["baseline"]["name"] == "prototypical network" and result["dataset"] == "glyphs"
    memory = result["memory"]
    assert memory["right_uniform"] == 0.2 < memory["right"] < 1 and 0 < memory["gate"] < 1
    assert 0 < memory["entropy"] < memory["entropy_uniform"] == pytest.approx(4.644, abs=1e-3)
    inner = json.loads((finished / "prototypes" / "result.json").read_text())
    assert inner["metrics"] == {kind: result["baseline"][kind] for kind in KINDS}
    assert inner["steps"] == result["steps"] == 5
    for name in ("memory_episode", "few_shot_accuracy", "training_curves"):
        assert (finished / "plots" / f"{name}.png").stat().st_size > 1000


def test_models_are_there_to_be_loaded_with_the_same_encoder(finished):
    memory, prototypes = load(finished), load(finished / "prototypes")
    assert type(memory) is MemoryTransformer and type(prototypes) is PrototypicalNetwork
    shapes = [
        {name: value.shape for name, value in m.encoder.state_dict().items()} for m in (memory, prototypes)
    ]
    assert shapes[0] == shapes[1]


def test_the_recorded_episode_is_what_the_model_does(finished):
    records = checkpoint.read(finished).records
    attention, gate = records["final_episode_attention"], records["final_episode_gate"]
    assert attention.shape == (25, 25) and gate.shape == (25,) and ((gate > 0) & (gate < 1)).all()
    assert attention.sum(axis=1) == pytest.approx(1, abs=1e-5)
    by_label = attention.reshape(25, 5, 5).sum(axis=2)  # slots of a character are side by side
    assert (by_label.argmax(axis=1) == records["final_episode_answers"]).all()


def test_scored_again_it_says_the_same(finished, capsys):
    assert run("few_shot", "--evaluate", finished, "--num_threads=1") == 0
    out = capsys.readouterr().out
    result = json.loads((finished / "result.json").read_text())
    for kind in KINDS:
        assert f"{100 * result['metrics'][kind]:.2f} ± {100 * result['standard_error'][kind]:.2f}" in out


def test_an_embedding_is_the_mean_over_views(finished):
    test, model = read_characters(FewShotConfig(dataset="glyphs"))[1].take(range(3)), load(finished)
    one, two, three = (embed(model, test, views=views) for views in (1, 2, 3))
    images = as_ink(test.images).flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(one.flatten(0, 1), model.encode(images))
        seen = distort(images, np.random.default_rng(1), angle=5, scale=0.07, shift=0.05)
        torch.testing.assert_close((two * 2 - one).flatten(0, 1), model.encode(seen), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, three)


def test_attention_is_summed_up(finished):
    config = FewShotConfig(ways=[5], shots=[2], dataset="glyphs")
    test = read_characters(config)[1]
    episodes, model = config.episodes_of(test, 5, 2), load(finished)
    torch.nn.init.constant_(model.memory.recall_conv.log_temperature, -30.0)
    torch.nn.init.zeros_(model.memory.gate.weight)
    found = reading(model, embed(model, test), episodes)
    assert found["right"] == pytest.approx(0.2) and found["entropy"] == pytest.approx(
        found["entropy_uniform"]
    )


def test_scores_are_those_of_single_episodes(finished):
    config = FewShotConfig(ways=[5], shots=[2], dataset="glyphs")
    test = read_characters(config)[1]
    episodes, model = config.episodes_of(test, 5, 2), load(finished)
    found = score(model, embed(model, test), episodes, 3)
    for index in range(3):
        batch = episodes.batch(index, 1)
        asked = batch.pop("labels")
        with torch.no_grad():
            right = (model(**batch).logits.argmax(-1) == asked).double().mean()
        assert found[index] == right


def test_test_characters_are_never_trained_on():
    config = FewShotConfig(dataset="glyphs")
    train, test = read_characters(config)
    drawings = [{x.tobytes() for x in part.images.reshape(-1, 28, 28)} for part in (train, test)]
    assert not drawings[0] & drawings[1]
    assert not set(train.alphabet) & set(test.alphabet)
    assert config.training_episodes(train).characters is train
    assert config.episodes_of(test, 5, 1).seed == SCORED_SEED > config.seed


def test_stopped_anywhere_it_goes_on_as_if_never_stopped(finished, tmp_path, monkeypatch):
    """Once in the training of the memory, once in that of its baseline."""
    original, calls = few_shot.FewShotJob.batch, []

    def interrupted(job, index, size, slots):
        calls.append(index)
        if len(calls) in (4, 9):
            raise KeyboardInterrupt
        return original(job, index, size, slots)

    monkeypatch.setattr(few_shot.FewShotJob, "batch", interrupted)
    flags = [*SMALL, "--out_dir", tmp_path]
    assert run("few_shot", *flags) == 130
    assert run("few_shot", "--resume", *flags) == 130
    assert run("few_shot", "--resume", *flags) == 0
    assert calls == [0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    for part in (".", "prototypes"):
        assert losses(tmp_path / "few_shot" / part) == losses(finished / part)
        whole, resumed = (load(run_dir / part).state_dict() for run_dir in (finished, tmp_path / "few_shot"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_model_alone(tmp_path):
    assert run("few_shot", *SMALL, "--max_steps=2", "--model=prototypes", "--out_dir", tmp_path) == 0
    result = json.loads((tmp_path / "few_shot" / "result.json").read_text())
    assert result["baseline"]["name"] == "nearest pixels"
    assert not (tmp_path / "few_shot" / "prototypes").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--ways", "300", "--shots", "1", "--num_slots=300"], "ways: no such episode of these characters"),
        (["--shots", "8", "--num_slots=40"], "shots: no such episode of these drawings"),
        (["--train_ways=2000", "--num_slots=9000"], "ways: no such episode of these characters"),
        (["--num_slots=10"], "--num_slots: value cannot be used; expected at least 25"),
        (["--dataset=omniglot"], "--data_dir: Omniglot is not part of this package"),
        (["--dataset=omniglot", "--data_dir=/nonexistent"], "no Omniglot here"),
        (["--dataset=mnist"], "mnist"),
        (["--held_out=5"], "held_out: no alphabet is that small"),
        (["--ways", "1"], "--ways: value cannot be used"),
    ],
)
def test_refused_before_training(flags, said, tmp_path, capsys):
    assert run("few_shot", *SMALL, *flags, "--out_dir", tmp_path) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_omniglot(data_dir, tmp_path):
    if not (data_dir / "omniglot").is_dir():
        pytest.skip("no Omniglot")
    for split, held_out in (("character", 200), ("alphabet", None)):
        config = FewShotConfig(data_dir=str(data_dir), split=split)
        train, test = read_characters(config)
        assert config.source == "omniglot" and len(train) + len(test) == 964
        assert len(test) == held_out or 100 < len(test) <= 200
        shared = set(train.alphabet) & set(test.alphabet)
        assert bool(shared) == (split == "character")
