import json
from argparse import Namespace

import pytest
import torch

from examples import own_hypergraph
from graphmoe.errors import ConfigError
from graphmoe.train.command import exit_code

SMALL = ["--seeds=2", "--steps=4", "--test_signals=10"]


def settings(**changed):
    args = {"nodes": 30, "hyperedges": 12, "group": 4, "train_signals": 24, "test_signals": 50, "steps": 150}
    return Namespace(**{**args, **changed})


def test_a_shortened_run(tmp_path, capsys):
    own_hypergraph.main([*SMALL, f"--out_dir={tmp_path}"])
    out = capsys.readouterr().out
    for row in ("chance: commoner answer", "no hyperedges", "equal weights", "all pairs", "no talk"):
        assert row in out
    assert (tmp_path / "own_hypergraph.png").stat().st_size > 20_000
    result = json.loads((tmp_path / "figures.json").read_text())
    assert max(result["difference"]) < 1e-12
    assert {len(values) for values in (result["accuracy"] | result["explained"]).values()} == {2}


def test_the_answer_follows_from_the_groups_that_count():
    sensors = own_hypergraph.draw_sensors(settings(), 0)
    assert sensors.edges.shape == (2, 48) and sensors.counts.sum() == 6
    groups = [sensors.edges[0][sensors.edges[1] == h] for h in range(12)]
    assert all(len(group.unique()) == 4 for group in groups)
    counted = {int(n) for h, group in enumerate(groups) if sensors.counts[h] for n in group}
    nothing = (sensors.y == own_hypergraph.UNSCORED).all(dim=0)
    assert {n for n in range(30) if not nothing[n]} == counted
    assert set(sensors.y.unique().tolist()) == {own_hypergraph.UNSCORED, 0, 1}


def test_hyperedges_matter_and_their_weights_are_found():
    args = settings()
    sensors = own_hypergraph.draw_sensors(args, 1)
    scores = {}
    for name, (count, learned) in {"alone": (0, False), "equal": (12, False), "learned": (12, True)}.items():
        torch.manual_seed(1)
        model = own_hypergraph.SensorNet(count, learned=learned)
        scores[name] = own_hypergraph.tell_apart(model, sensors, args)
        if name == "equal":
            assert (model.weights() == 1).all()
    assert scores["learned"] > scores["equal"] + 0.05 > scores["alone"] + 0.05
    weight = model.weights().detach()
    assert weight[sensors.counts].min() > weight[~sensors.counts].max()
    assert own_hypergraph.difference(model, sensors) < 1e-12


def test_the_check_against_the_formula_can_fail():
    sensors = own_hypergraph.draw_sensors(settings(), 2)
    model = own_hypergraph.SensorNet(12, learned=True)
    model(sensors.x[:1], sensors.edges)
    conv, weight = model.conv.double(), torch.rand(12).double()
    x = sensors.x[:2].double()
    dense = own_hypergraph.dense_formula(conv, x, sensors.edges, weight)
    torch.testing.assert_close(conv(x, sensors.edges, edge_weight=weight), dense)
    assert (conv(x, sensors.edges) - dense).abs().max() > 1e-2  # the weights matter


def test_wrong_flags(tmp_path):
    flags = [*SMALL, "--group=90", f"--out_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"--group: a group has more sensors.*expected 60; got 90"):
        own_hypergraph.main(flags)
    assert exit_code(own_hypergraph.main, flags) == 2
