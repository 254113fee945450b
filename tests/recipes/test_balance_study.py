"""The study of balancing: one setting an arm, loads of single steps beside two floors, its picture."""

import json

import pytest
from command_line import SMALL, run

from graphmoe import checkpoint
from recipes.balance_study import ARMS, BalanceConfig, arms_of

FLAGS = [*SMALL, "--max_steps=4", "--num_seeds=2", "--num_experts=4", "--sample_tokens=0", "--eval_every=4"]
FLAGS = [*FLAGS, "--final_windows=8", "--log_every=1"]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert run("balance_study", *FLAGS, "--dataset", corpus, "--out_dir", out) == 0
    return out / "balance_study"


def test_what_it_leaves(finished):
    files = {path.name for path in finished.iterdir() if path.is_file()}
    assert files >= {"result.json", "comparison.md", "comparison.csv", "comparison.png", "balance.png"}
    table = (finished / "comparison.md").read_text()
    assert all(f"\n| {arm} " in table for arm in ARMS) and "against aux" in table
    assert "MaxVio of a step / even load / blind" in table and "experts a token" in table
    for arm in ARMS:
        for seed in (0, 1):
            record = checkpoint.read(finished / f"{arm}-lr0.004-seed{seed}")
            assert record.records["step_max_violation"].shape == (4, 2)
            experts = record.result["experts"]
            assert experts["step_max_violation"] == pytest.approx(
                record.records["step_max_violation"].mean(axis=0).tolist(), rel=1e-5
            )
            assert ("edges_per_token" in experts) == (arm == "threshold")
            assert min(experts["batch_violation_even"]) > 0


def test_arms_differ_in_what_balances_and_in_nothing_else(finished):
    names = ("router", "router_bias", "router_aux_loss_coef")
    found = {}
    for arm in ARMS:
        config = checkpoint.read(finished / f"{arm}-lr0.004-seed0").config
        found[arm] = tuple(config[name] for name in names)
    assert found == {
        "aux": ("topk", False, 0.01),
        "none": ("topk", False, 0.0),
        "bias": ("topk", True, 0.0),
        "threshold": ("threshold", False, 0.0),
    }
    params = {json.loads(path.read_text())["params_total"] for path in finished.glob("*-lr*/result.json")}
    assert len(params) == 1


def test_only_the_bias_is_moved(finished):
    from safetensors.numpy import load_file

    for arm in ARMS:
        tensors = load_file(checkpoint.latest(finished / f"{arm}-lr0.004-seed0") / "model.safetensors")
        moved = {name.rsplit(".", 1)[-1]: value.any() for name, value in tensors.items() if "router" in name}
        assert set(moved) == {"weight"} | {
            "bias": {"bias_steps"}, "threshold": {"threshold", "observed"},
        }.get(arm, set())  # fmt: skip
        assert all(moved.values())


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--router=threshold", "--router: "),
        ("--router_bias=true", "--router: "),
        ("--router_aux_loss_coef=0", "--router_aux_loss_coef: "),
        ("--arms=aux,aux", "--arms: "),
        ("--num_seeds=0", "--num_seeds: "),
        ("--router_bias_rate=0", "--router_bias_rate: "),
        ("--router_threshold_decay=1", "--router_threshold_decay: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flag, message, tmp_path, capsys):
    assert run("balance_study", flag, "--out_dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_chosen_arms():
    assert list(arms_of(BalanceConfig(arms=["bias", "aux"]))) == ["bias", "aux"]
