"""The copy recipes: what they leave, evaluation, bad input, the arms of the ablation."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from command_line import run

from graphmoe import checkpoint, load
from graphmoe.data.copy_task import CopyTask
from graphmoe.models import MocaConfig, MocaForTokenPrediction
from graphmoe.train.config import parse
from recipes.frame import train
from recipes.moca_ablate import MocaAblateConfig, arms_of
from recipes.moca_config import MocaCopyConfig
from recipes.moca_copy import MocaCopyJob
from recipes.moca_scores import by_length, distinct_slots, figures, least_distance, one_sequence, recall

SMALL = [
    *("--embed_dim=8", "--expert_dim=8", "--num_slots=6", "--num_tokens=5", "--min_length=2"),
    *("--max_length=4", "--batch_size=4", "--test_sequences=9", "--eval_sequences=4", "--warmup_steps=1"),
    *("--log_every=1", "--eval_every=2", "--save_every=2", "--num_threads=1", "--device=cpu"),
]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("moca_copy", *SMALL, "--max_steps=3", "--baseline_steps=2", "--out_dir", out) == 0
    return out / "moca_copy"


def test_what_a_run_leaves(finished):
    result = read(finished / "result.json")
    metrics = result["metrics"]
    assert {"recall_accuracy", "exact_sequences", "loss", "edges_kept", "tokens_per_second"} <= set(metrics)
    assert result["chance"]["recall_accuracy"] == 1 / 5 and result["chance"]["loss"] == math.log(5)
    assert result["baseline"]["name"] == "no memory" and result["baseline"]["steps"] == 2
    assert (finished / "no_memory" / "result.json").is_file()
    assert set(result["memory"]) >= {"distinct_slots", "least_distance_first", "least_distance_written"}
    records = checkpoint.read(finished).records
    assert records["final_memory_write"].shape == records["final_memory_read"].shape == (9, 6)
    assert abs(records["final_memory_load"].sum() - 1) < 1e-5
    plots = {path.stem for path in (finished / "plots").glob("*.png")}
    assert {"memory_map", "slot_load", "copy_accuracy"} <= plots
    assert load(finished).model.budget_strength == 1


def test_a_finished_run_can_be_scored_again(finished, capsys):
    assert run("moca_copy", "--evaluate", finished) == 0
    said = capsys.readouterr().out
    value = 100 * read(finished / "result.json")["metrics"]["recall_accuracy"]
    assert f"recalled: {value:.2f} % of tokens" in said and "chance 20.00 %" in said


def test_a_stopped_run_repeats_one_that_was_not(tmp_path):
    flags = [*SMALL, "--max_steps=3", "--baseline_steps=0", "--budget_begin=0.3", f"--out_dir={tmp_path}"]
    config = parse(MocaCopyConfig, flags, prog="python -m recipes.moca_copy", description="")
    train(MocaCopyJob, config, "moca_copy", pictures=False)
    step = tmp_path / "moca_copy" / "step-00000003"
    want = load(step).state_dict()
    shutil.rmtree(step)
    train(MocaCopyJob, replace(config, resume=True), "moca_copy", pictures=False)
    for name, value in load(step).state_dict().items():
        assert torch.equal(value, want[name]), name


def test_scores_are_those_of_the_formula():
    scores = {
        "length": torch.tensor([10, 12, 25]),
        "right": torch.tensor([10, 6, 20]),
        "loss": torch.tensor([1.0, 2.0, 1.7]),
        "kept": torch.tensor(0.5),
    }
    found = figures(scores)
    assert found["recall_accuracy"] == 36 / 47 and found["exact_sequences"] == pytest.approx(1 / 3)
    assert found["loss"] == pytest.approx(0.1) and found["edges_kept"] == 0.5
    assert by_length(scores) == {"10-12": 16 / 22, "25-25": 0.8}
    assert least_distance(torch.tensor([[0.0, 0], [3, 4], [0, 1]])) == 1.0
    assert least_distance(torch.zeros(1, 3)) is None
    assert distinct_slots(torch.tensor([[0.0, 1], [0, 2], [3, 0]]), 2) == 1


def test_the_map_of_a_sequence_has_its_edges():
    task = CopyTask(5, 2, 4)
    config = MocaConfig(
        vocab_size=task.vocab_size, hidden_size=8, intermediate_size=8, num_slots=6,
        max_position_embeddings=5, delimiter_token_id=task.delimiter,
    )  # fmt: skip
    model = MocaForTokenPrediction(config)
    found = one_sequence(model, task)
    assert ((found["read"] > 0).sum(dim=1) <= 2).all()
    torch.testing.assert_close(found["read"].sum(dim=1), torch.ones(9))
    assert (found["answers"][:5] == -100).all() and (found["answers"][5:] >= 0).all()
    scores = recall(model, task, 70)  # more than one batch
    assert len(scores["length"]) == 70 and (scores["right"] <= scores["length"]).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slots_per_token=7"], "--slots_per_token"),
        (["--max_length=1"], "--min_length"),
        (["--budget_begin=0.9"], "--budget_begin"),
        (["--dataset=text"], "--dataset"),
        (["--top_k=9"], "--top_k"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys, tmp_path):
    assert run("moca_copy", *SMALL, *flags, "--out_dir", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_arms_differ_in_what_they_say():
    arms = arms_of(MocaAblateConfig(run_name="x"))
    assert list(arms) == [
        *("full", "no_memory", "no_experts", "dense_routing", "half_size"),
        *("budget_0", "budget_0.5", "budget_5"),
    ]
    models = {name: arm.architecture() for name, arm in arms.items()}
    assert models["no_memory"].num_slots == 0 and models["no_experts"].num_experts == 1
    assert models["dense_routing"].num_slots_per_tok == models["full"].num_slots
    assert models["half_size"].hidden_size * 2 == models["full"].hidden_size
    assert models["budget_5"].budget_coef == 5 and models["budget_0"].budget_coef == 0
    assert {type(arm) for arm in arms.values()} == {MocaCopyConfig}


def test_what_an_ablation_leaves(tmp_path):
    flags = [*SMALL, "--max_steps=2", "--num_seeds=2", "--arms", "full", "no_memory", "--out_dir", tmp_path]
    assert run("moca_ablate", *flags) == 0
    folder = tmp_path / "moca_ablate"
    assert {"comparison.md", "memory_ablation.png", "result.json"} <= {p.name for p in folder.iterdir()}
    table = (folder / "comparison.md").read_text()
    assert "edges kept" in table and "\n| no_memory " in table and "\n| chance " in table
    assert read(folder / "result.json")["metrics"].keys() == {"full", "no_memory"}
