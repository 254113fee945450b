import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.datasets import KarateClub

from examples import gnn_moe_nodes
from examples.common import mean_and_spread, paired, verdict
from graphmoe.errors import ConfigError, DataError
from graphmoe.nn import MoELayer
from graphmoe.train.command import exit_code

ROOT = Path(__file__).parents[2]
SMALL = ["--seeds=2", "--steps=3"]


def test_a_shortened_run(tmp_path, capsys):
    gnn_moe_nodes.main([*SMALL, f"--out_dir={tmp_path}"])
    out = capsys.readouterr().out
    for row in ("chance: largest class", "label propagation", "dense branch", "mixture, expert choice"):
        assert row in out
    assert "ties with dense branch" in out or "loses to dense" in out or "gains over dense" in out
    assert (tmp_path / "gnn_moe_nodes.png").stat().st_size > 20_000
    result = json.loads((tmp_path / "figures.json").read_text())
    assert {len(values) for values in result["accuracy"].values()} == {2}
    dense, mixture = (result["parameters"][name] for name in ("dense branch", "mixture, top-k"))
    assert mixture[1] - dense[1] == 4 * 16  # the router, and nothing else
    again = tmp_path / "again"
    gnn_moe_nodes.main([*SMALL, f"--out_dir={again}"])
    assert json.loads((again / "figures.json").read_text()) == result  # a function of the seeds


def test_learns_the_karate_club():
    """Far above the largest class, with either router."""
    data = KarateClub()[0]
    args = type("Args", (), {"steps": 100, "lr": 0.01, "channels": 16, "num_experts": 4, "k": 2})
    args.expert_channels = 16
    known = gnn_moe_nodes.split(data.y, 3, torch.Generator().manual_seed(0))
    assert known.sum() == 12 and data.y[known].bincount().tolist() == [3, 3, 3, 3]
    for name in gnn_moe_nodes.MIXTURES:
        torch.manual_seed(0)
        model = gnn_moe_nodes.NodeGNN(gnn_moe_nodes.make_branch(name, args), 16, 4, dropout=0.5)
        accuracy, record = gnn_moe_nodes.train(model, data, known, args)
        assert accuracy > 0.65
        share = gnn_moe_nodes.serving(record, data.y)
        edges = (share * data.y.bincount().unsqueeze(1)).sum()
        assert edges.round() == int(record.routing.ptr[-1]) == 2 * 34


def test_top_expert_and_nobody():
    layer = MoELayer(4, 3, 1, router="expert_choice", router_kwargs={"capacity_factor": 0.5})
    _, record = layer(torch.randn(12, 4), return_record=True)
    top = gnn_moe_nodes.top_expert(record)
    for node in range(12):
        edges = (record.routing.token == node).nonzero().flatten()
        want = record.routing.expert[edges[record.routing.weight[edges].argmax()]] if len(edges) else 3
        assert top[node] == want
    assert (top == 3).any() and (top < 3).any()


def write_planetoid(folder: Path, name: str) -> None:
    """A small graph of two clear classes in the files of a Planetoid data set."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    y = np.eye(2, dtype=np.int32)[np.arange(600) % 2]
    x = scipy.sparse.csr_matrix((y @ random.normal(size=(2, 6)) + random.normal(size=(600, 6))).astype("f"))
    graph = {i: [(i + 2) % 600, (i + 4) % 600] for i in range(600)}  # PyG wants more than 500 nodes
    parts = {
        "x": x[:4],
        "y": y[:4],
        "allx": x[:560],
        "ally": y[:560],
        "tx": x[560:],
        "ty": y[560:],
        "graph": graph,
    }
    for key, value in parts.items():
        (raw / f"ind.{name.lower()}.{key}").write_bytes(pickle.dumps(value))
    (raw / f"ind.{name.lower()}.test.index").write_text("\n".join(map(str, range(560, 600))))


def test_a_data_set_on_disk(tmp_path, capsys):
    write_planetoid(tmp_path, "Cora")
    flags = [*SMALL, "--dataset=Cora", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
    gnn_moe_nodes.main(flags)
    assert "Cora: 600 nodes" in capsys.readouterr().out
    for file in (tmp_path / "Cora").rglob("*"):
        if file.is_file():
            file.write_bytes(b"broken")
    with pytest.raises(DataError, match="Cora can neither be read nor downloaded"):
        gnn_moe_nodes.main(flags)


@pytest.mark.parametrize(
    "flags, kind, match",
    [
        (["--dataset=Cora"], ConfigError, "--data_dir: Cora does not come with PyG"),
        (["--dataset=PubMed", "--data_dir=/nowhere"], DataError, r"not there.*ind\.pubmed\.\*.*--download"),
        (["--dataset=Zachary"], ConfigError, "invalid choice"),
        (["--seeds=1"], ConfigError, "argument --seeds: expected an integer, at least 2; got '1'"),
        (["--steps=many"], ConfigError, "--steps: expected.*got 'many'"),
        (["--labelled=4"], ConfigError, "--labelled: no node of a class.*at most 3; got 4"),
        (["--k=5"], ConfigError, "k must not exceed"),
        (["--sedes=3"], ConfigError, "unrecognized arguments"),
    ],
)  # fmt: skip
def test_wrong_flags(flags, kind, match, tmp_path, capsys):
    flags = [*SMALL, *flags, f"--out_dir={tmp_path}"]
    with pytest.raises(kind, match=match):
        gnn_moe_nodes.main(flags)
    assert exit_code(gnn_moe_nodes.main, flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="folder cannot be made"):
        gnn_moe_nodes.main([*SMALL, f"--out_dir={tmp_path / 'file'}"])


@pytest.mark.parametrize("name", ["gnn_moe_nodes", "own_hypergraph"])
@pytest.mark.parametrize("as_module", [True, False])
def test_help(name, as_module):
    """Both ways to call an example."""
    call = ["-m", f"examples.{name}"] if as_module else [f"examples/{name}.py"]
    done = subprocess.run(
        [sys.executable, *call, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--seeds N" in done.stdout and "--out_dir" in done.stdout


def test_how_sure_a_difference_is():
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    mean, error = paired([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert mean == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-9)
    noisy = [0.1, -0.1, 0.3, -0.2, 0.05]
    zero = [0.0] * 5
    assert verdict("a", noisy, "b", zero).startswith("a ties with b: +3.0 points")
    assert verdict("a", [v + 1 for v in noisy], "b", zero).startswith("a gains over b")
    assert verdict("a", [v - 1 for v in noisy], "b", zero).startswith("a loses to b")
    # Two seeds are hardly evidence: 97.5 % of Student's t with one degree of freedom is 12.7.
    assert "ties" in verdict("a", [0.1, 0.2], "b", [0.0, 0.0])
