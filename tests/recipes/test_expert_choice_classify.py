"""Classifiers of texts and their comparison: what they leave, stopping, resuming, equal cost, bad input."""

import json
import os
import signal
import threading
from itertools import pairwise

import pytest
import torch
from command_line import losses, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graphmoe import checkpoint, load
from graphmoe.data import docstrings
from graphmoe.models.cost import mean_flops
from graphmoe.train.command import Stopped
from recipes import classification, expert_choice_classify
from recipes.classification_config import ClassifierConfig, build_model, read_texts
from recipes.expert_choice_classify import ARMS, ExpertChoiceClassifyConfig, matched_arms
from recipes.text_baselines import tfidf

SMALL = [
    *(
        "--embed_dim=16",
        "--num_layers=2",
        "--num_heads=2",
        "--expert_dim=16",
        "--num_experts=4",
        "--seq_len=24",
    ),
    *("--vocab_size=300", "--batch_size=8", "--warmup_steps=2", "--log_every=2", "--eval_every=4"),
    *("--save_every=4", "--num_threads=1", "--device=cpu"),
]
STUDY = [*SMALL, "--max_steps=3", "--num_seeds=2", "--learning_rates", "1e-3", "3e-3"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Docstrings of two packages, a handful of each."""
    _, rows = docstrings.docstring_rows(2)
    kept = {label: [row for row in rows if row.label == label][:60] for label in {row.label for row in rows}}
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    lines = [f"{' '.join(row.text.split())}\t{row.label}\n" for part in kept.values() for row in part]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("expert_choice_classify", *STUDY, "--dataset", texts, "--out_dir", out) == 0
    return out / "expert_choice_classify"


@pytest.fixture(scope="module")
def classifier(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, "--max_steps=12", "--router=expert_choice", "--dataset", texts, "--out_dir", out]
    assert run("classify", *flags) == 0
    return out / "classify"


def read(path):
    return json.loads(path.read_text())


def test_what_a_comparison_leaves(finished):
    files = {path.name for path in finished.iterdir()}
    assert files >= {"config.yaml", "tuning.json", "result.json", "comparison.md", "comparison.csv"}
    assert files >= {"comparison.png", "trade_off.png"} and "balance.png" not in files
    best = read(finished / "tuning.json")["best"]
    runs = {path.parent.name for path in finished.glob("*/result.json")}
    first = {f"{arm}-lr{rate}-seed0" for arm in ARMS for rate in ("0.001", "0.003")}
    assert runs == first | {f"{arm}-lr{best[arm]:g}-seed1" for arm in ARMS}
    table = (finished / "comparison.md").read_text()
    header = table.splitlines()[0]
    assert all(f"\n| {name} " in table for name in (*ARMS, "TF-IDF + logistic regression", "majority class"))
    assert "held-out accuracy" in header and "against dense" in header and "seconds" in header
    assert "tokens nobody chose / blind" in header and "perplexity" not in header
    assert "positive is better" in table
    result = read(finished / "result.json")
    for arm in ARMS:
        own = [read(finished / f"{arm}-lr{best[arm]:g}-seed{seed}" / "result.json") for seed in (0, 1)]
        mean = sum(row["metrics"]["accuracy"] for row in own) / 2
        assert result["metrics"][arm] == pytest.approx(mean)
    assert result["metrics"]["accuracy"] == result["metrics"]["expert_choice"]
    assert result["chance"]["accuracy"] == 0.5 and result["majority"]["accuracy"] == pytest.approx(
        0.5, abs=0.1
    )
    assert result["params_active"] < result["params_total"] and result["steps"] == 3
    assert result["baseline"]["name"] == "TF-IDF + logistic regression"


def test_learning_rates_and_steps_are_chosen_on_the_validation_part(finished):
    tuning = read(finished / "tuning.json")
    for arm in ARMS:
        tried = tuning["losses"][arm]
        assert tried[f"{tuning['best'][arm]:g}"] == min(tried.values())
        for rate, loss in tried.items():
            result = read(finished / f"{arm}-lr{rate}-seed0" / "result.json")
            assert result["validation"]["loss"] == loss != result["metrics"]["loss"]


def test_routing_of_the_arms(finished):
    best = read(finished / "tuning.json")["best"]
    experts = {
        arm: read(finished / f"{arm}-lr{best[arm]:g}-seed0" / "result.json").get("experts") for arm in ARMS
    }
    assert experts["dense"] is None
    chosen, token = experts["expert_choice"], experts["token_choice"]
    assert chosen["max_violation"] == [0.0, 0.0] and min(token["max_violation"]) > 0
    assert token["edges_per_token"] == [2.0, 2.0] and token["unserved"] == [0.0, 0.0]
    assert all(2 <= edges < 2.2 for edges in chosen["edges_per_token"])
    assert all(0 <= share < 1 for share in chosen["unserved"])
    assert all(0.05 < share < 0.07 for share in chosen["unserved_random"])  # (1 - 1/2)^4


def test_arms_have_equal_cost(texts):
    config = ExpertChoiceClassifyConfig(dataset=str(texts), vocab_size=300, seq_len=24, expert_dim=96)
    read_once = read_texts(config)
    arms = matched_arms(config, read_once)
    assert list(arms) == list(ARMS) and arms["token_choice"].expert_dim == 96
    models = {name: build_model(arm, read_once) for name, arm in arms.items()}
    costs = {name: mean_flops(model, read_once.lengths) for name, model in models.items()}
    assert all(abs(cost / costs["token_choice"] - 1) < 0.01 for cost in costs.values()), costs
    active = {name: model.num_active_parameters() for name, model in models.items()}
    assert all(abs(count / active["token_choice"] - 1) < 0.05 for count in active.values()), active
    # Short texts give an expert that chooses more than its share, and it is narrower for that.
    assert arms["expert_choice"].expert_dim < 96 < arms["dense"].expert_dim


def test_flops_count_what_experts_take(texts):
    config = ClassifierConfig(dataset=str(texts), vocab_size=300, router="expert_choice", num_experts=4)
    model = build_model(config, read_texts(config))
    even, odd = mean_flops(model, [16] * 10), mean_flops(model, [15] * 10)
    # 4 experts take ceil(2 * 15 / 4) = 8 of 15 tokens: 32 edges in place of 30. Attention is over 15, not 16.
    expert = 3 * 2 * config.embed_dim * config.expert_dim
    attention = 4 * config.embed_dim
    assert odd - even == pytest.approx(config.num_layers * (expert * (32 / 15 - 2) - attention), rel=1e-3)


def test_stopped_and_resumed_gives_the_same_table(finished, texts, tmp_path, monkeypatch):
    train, calls = classification.train, []

    def stop_in_the_fourth(config, *args, **options):
        calls.append(config.run_name)
        if len(calls) == 4:
            raise Stopped(signal.SIGTERM)
        return train(config, *args, **options)

    monkeypatch.setattr(classification, "train", stop_in_the_fourth)
    flags = ["--dataset", texts, "--out_dir", tmp_path]
    assert run("expert_choice_classify", *STUDY, *flags) == 143
    assert run("expert_choice_classify", "--resume", "--out_dir", tmp_path) == 0
    assert len(calls) == len(set(calls)) + 1 == 10  # the stopped run twice, the others once
    again = tmp_path / "expert_choice_classify"
    assert read(again / "result.json")["metrics"] == read(finished / "result.json")["metrics"]
    for path in finished.glob("*/metrics.jsonl"):
        assert losses(path.parent) == losses(again / path.parent.name)
    calls.clear()
    assert run("expert_choice_classify", "--evaluate", again) == 0
    assert calls == []


def test_a_smoke_run_evaluates_saves_and_draws(texts, tmp_path):
    flags = [*SMALL, "--max_steps=2", "--dataset", texts, "--out_dir", tmp_path, "--arms", "expert_choice"]
    assert run("expert_choice_classify", *flags, "--num_seeds=1", "--learning_rates", "1e-3") == 0
    run_dir = tmp_path / "expert_choice_classify"
    assert (run_dir / "result.json").exists() and (run_dir / "comparison.png").exists()
    assert load(run_dir / "expert_choice-lr0.001-seed0").config.num_labels == 2


def test_what_a_classifier_leaves(classifier, capsys):
    result = read(classifier / "result.json")
    assert {"recipe", "metrics", "validation", "chance", "baseline", "majority", "seconds"} <= set(result)
    assert {"params_total", "params_active", "flops_per_token", "seed", "dataset", "versions"} <= set(result)
    assert result["recipe"] == "classify" and (classifier / "report.html").exists()
    assert list((classifier / "plots").glob("*.png"))
    record = checkpoint.read(classifier)
    rows = [row for row in record.metrics if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [4, 8, 12]
    best = min(rows, key=lambda row: (row["loss"], row["step"]))
    assert result["best_step"] == best["step"]
    assert result["validation"] == {name: best[name] for name in ("step", "loss", "accuracy")}
    assert run("classify", "--evaluate", classifier) == 0
    printed = capsys.readouterr().out
    assert f"model: accuracy {result['metrics']['accuracy']:.4f}" in printed
    assert f"majority class: accuracy {result['majority']['accuracy']:.4f}" in printed


def test_its_checkpoint_is_a_transformers_model_with_a_tokenizer(classifier):
    step = classifier / "step-00000012"
    model = AutoModelForSequenceClassification.from_pretrained(step).eval()
    tokenizer = AutoTokenizer.from_pretrained(step)
    batch = tokenizer(["Return the value.", "x"], return_tensors="pt", padding=True)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = model(**{k: v[:1] for k, v in batch.items() if k in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(logits[:1], alone)
    assert (
        set(model.config.id2label.values()) == set(model.config.label2id) and len(model.config.id2label) == 2
    )


def test_ctrl_c_is_clean_and_resume_gives_the_same_losses(classifier, texts, tmp_path, monkeypatch):
    flags = [*SMALL, "--max_steps=12", "--router=expert_choice", "--dataset", texts, "--out_dir", tmp_path]
    make, seen = classification.classifier_batch, []

    def interrupt(batch):
        seen.append(batch)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return make(batch)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(classification, "classifier_batch", interrupt)
    assert run("classify", *flags) == 130
    cut = tmp_path / "classify"
    assert not (cut / "result.json").exists() and (cut / "step-00000006").exists()
    assert run("classify", "--resume", "--out_dir", tmp_path) == 0
    got, want = losses(cut), losses(classifier)
    assert {step: got[step] for step in want} == want and set(got) - set(want) <= {6}
    one, two = (path / "step-00000012" / "model.safetensors" for path in (cut, classifier))
    assert one.read_bytes() == two.read_bytes()


def test_training_learns_and_the_baseline_is_sane(texts, tmp_path):
    flags = [*SMALL, "--max_steps=60", "--learning_rate=0.01", "--dataset", texts, "--out_dir", tmp_path]
    assert run("classify", *flags, "--router=expert_choice") == 0
    rows = [row for row in checkpoint.read(tmp_path / "classify").metrics if row["kind"] == "train"]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    config = ClassifierConfig(dataset=str(texts), vocab_size=300)
    data = read_texts(config).data
    figures = tfidf(data)
    assert figures["accuracy"] > data.majority() + 0.1 and 0 < figures["loss"] < 0.7


def test_rows_of_a_rank_are_a_part_of_the_batch(texts):
    config = ClassifierConfig(dataset=str(texts), vocab_size=300)
    batches = read_texts(config).batches("train", seed=3)
    whole = batches.batch(0, 8)
    parts = [batches.batch(0, 8, slots) for slots in (slice(0, 4), slice(4, 8))]
    assert [label for part in parts for label in part.labels] == whole.labels.tolist()
    assert all(one.ids.shape[1] > 0 for one, _ in pairwise(parts))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "dense", "mesh"], "--arms: value cannot be used; expected different ones of dense"),
        (["--router=threshold"], "--router"),
        (["--num_experts=1", "--top_k=1"], "--num_experts"),
        (["--is_causal=true"], "--is_causal"),
        (["--num_seeds=0"], "--num_seeds"),
        (["--learning_rates", "0"], "--learning_rates"),
        (["--top_k=9"], "--top_k"),
        (["--dataset=nonsense"], "nonsense: no such labelled texts"),
        (["--dataset=ag_news"], "data_dir: ag_news is not downloaded"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, message, texts, tmp_path, capsys):
    out = tmp_path / "runs"
    assert run("expert_choice_classify", *STUDY, "--dataset", texts, "--out_dir", out, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
    assert not out.exists()


def test_a_causal_classifier_refuses_experts_that_choose(texts, tmp_path, capsys):
    flags = [*SMALL, "--is_causal=true", "--router=expert_choice", "--dataset", texts, "--out_dir", tmp_path]
    assert run("classify", *flags) == 2
    assert "--router: experts that choose their tokens see the future" in capsys.readouterr().err


def test_the_arms_are_what_they_are_called():
    assert expert_choice_classify.REFERENCE in ARMS and expert_choice_classify.HEADLINE in ARMS
