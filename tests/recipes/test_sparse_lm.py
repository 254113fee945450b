"""Language models with sparse experts: what a run leaves, its edges, the others beside it, going on."""

import json

import numpy as np
import pytest
from command_line import SMALL, losses, run

import graphmoe
from graphmoe import checkpoint
from graphmoe.errors import ConfigError
from graphmoe.train.rewire import sparse_layers
from recipes.frame import train
from recipes.sparse_experts import SparseExpertsConfig, SparseExpertsJob

FLAGS = [*SMALL, "--expert_dim=20", "--rewire_every=2", "--final_windows=4"]
EDGES = 2 * 6 * (128 + 64)  # blocks, experts, and 20 % of 16 x 40 and of 20 x 16 places


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, "--dataset", corpus, "--out_dir", out, "--max_steps=8"]
    flags += ["--beside", "narrow", "static"]
    assert run("sparse_lm", *flags) == 0
    return out / "sparse_lm"


def read(path):
    return json.loads((path / "result.json").read_text())


def test_a_run_and_those_beside_it(finished):
    result = read(finished)
    narrow, static = (graphmoe.load(finished / name) for name in ("narrow", "static"))
    assert result["edges"] == {"before": EDGES, "after": EDGES}
    assert result["params_active"] == result["narrow"]["params_active"] == result["static"]["params_active"]
    assert result["flops_per_token"] == result["narrow"]["flops_per_token"]
    assert sparse_layers(narrow) == [] and narrow.config.intermediate_size == 4
    assert [layer.survival() for layer in sparse_layers(static)] == [1.0] * 24
    runs = (result, result["narrow"], result["static"])
    different = {one["metrics"]["loss"] for one in runs}
    assert len(different) == 3 and result["baseline"]["name"] == "unigram"
    # After steps 2, 4 and 6, three quarters of the steps.
    assert {int(layer.rewirings) for layer in sparse_layers(graphmoe.load(finished))} == {3}


def test_the_records_are_those_of_the_edges(finished):
    records, model = checkpoint.read(finished).records, graphmoe.load(finished)
    assert records["sparse_density"] == pytest.approx(0.2)
    assert (records["sparse_edges"] == EDGES // 2).all() and records["sparse_survival"].shape[1] == 2
    for block, (layer, at) in enumerate(zip(model.model.layers, records["sparse_survival"][-1], strict=True)):
        maps = sparse_layers(layer)
        weights = [part.num_edges for part in maps]
        assert at == pytest.approx(np.average([part.survival() for part in maps], weights=weights))
        mine = records["final_feeds"][0] == block
        assert np.array_equal(records["final_feeds"][1][mine], maps[0].source)
        assert np.array_equal(records["final_feeds_age"][mine], maps[0].age())
    plots = {path.stem for path in (finished / "plots").iterdir()}
    assert plots >= {"edge_survival", "edge_ages", "degree_distribution", "sparse_mask", "expert_load"}


def test_scoring_again_says_the_same(finished, capsys):
    assert run("sparse_lm", "--evaluate", finished) == 0
    assert f"model: loss {read(finished)['metrics']['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("topology", ["set", "rigl"])
def test_a_run_that_goes_on(topology, corpus, tmp_path):
    def go_on(name, steps, **options):
        config = SparseExpertsConfig(
            tokenizer="bytes", seq_len=32, batch_size=4, embed_dim=16, num_layers=2, num_heads=2,
            expert_dim=20, eval_windows=4, final_windows=4, warmup_steps=2, log_every=2, num_threads=1,
            device="cpu", sample_tokens=0, rewire_every=2, rewire_until=1, lr_scheduler_type="constant",
            topology=topology, dataset=str(corpus), out_dir=str(tmp_path), run_name=name,
            max_steps=steps, **options,
        )  # fmt: skip
        train(SparseExpertsJob, config, "sparse_lm", pictures=False, thorough=False)

    go_on("whole", 9)
    go_on("cut", 5)
    go_on("cut", 9, resume=True)
    whole, cut = (losses(tmp_path / name) for name in ("whole", "cut"))
    assert {step: cut[step] for step in whole} == whole
    models = [graphmoe.load(tmp_path / name) for name in ("whole", "cut")]
    for one, two in zip(*(sparse_layers(model) for model in models), strict=True):
        assert one.edge_index().equal(two.edge_index()) and int(one.rewirings) == 4


@pytest.mark.parametrize(
    "options, match",
    [
        ({"expert_density": 0}, "--expert_density"),
        ({"beside": ["wide", "wide"]}, "--beside: .* different ones of narrow, wide, static"),
        ({"topology": "dense", "beside": ["wide"]}, "--beside: .* nothing: there are no edges"),
        ({"parallel": "fsdp"}, "--parallel: .* edges cannot be sharded"),
        ({"rewire_until": 2}, "--rewire_until"),
        ({"zeta": -1}, "--zeta"),
        ({"rewire_every": 0}, "--rewire_every"),
    ],
)
def test_flags_that_cannot_be_used(options, match):
    with pytest.raises(ConfigError, match=match):
        SparseExpertsConfig(**options)


@pytest.mark.parametrize("flags, message", [
    (["--num_ghosts=1"], "--num_ghosts: ghosts are slices of stacked matrices"),
    (["--orthogonality_weight_coef=1"], "--orthogonality_weight_coef: edges of different experts"),
    (["--expert_distribution=fair"], "--expert_distribution: unknown expert_distribution"),
    (["--reasoning_steps=2"], "--reasoning_steps: sparse experts are applied once"),
])  # fmt: skip
def test_options_that_do_not_go_together(flags, message, corpus, tmp_path, capsys):
    assert run("sparse_lm", *FLAGS, "--dataset", corpus, "--out_dir", tmp_path / "runs", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()
