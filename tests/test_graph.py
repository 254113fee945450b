import pytest
import torch

from graphmoe import graph
from graphmoe.errors import ConfigError, GraphError
from graphmoe.typing import ROUTES


def test_complete():
    assert graph.complete(3).tolist() == [[1, 2, 0, 2, 0, 1], [0, 0, 1, 1, 2, 2]]
    assert graph.complete(2, loops=True).tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert graph.complete(1).shape == (2, 0)


def test_causal_never_looks_ahead_or_across_sequences():
    source, target = graph.causal(2, 4)
    assert len(source) == 2 * 10
    assert ((source // 4) == (target // 4)).all()
    assert (source <= target).all()


def test_causal_with_past():
    source, target = graph.causal(1, 2, past=3)
    seen = [sorted(source[target == t].tolist()) for t in (0, 1)]
    assert seen == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_co_active_leaves_out_absent_rows_and_other_tokens():
    expert = torch.tensor([[0, 2], [1, 3]])  # 3 experts: row 3 is absent
    assert graph.co_active(expert, 3).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    "strategy, count, size", [("all_pairs", 10, 2), ("all_triplets", 10, 3), ("all", 1, 5)]
)
def test_hyperedges(strategy, count, size):
    expert, hyperedge = graph.hyperedges(5, strategy)
    assert hyperedge.bincount().tolist() == [size] * count
    assert (hyperedge.diff() >= 0).all()
    members = {tuple(expert[hyperedge == h].tolist()) for h in range(count)}
    assert len(members) == count


def test_hyperedges_refuse_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"num_experts.*at least 3.*got 2"):
        graph.hyperedges(2, "all_triplets")
    with pytest.raises(ConfigError, match=r"hyperedge_strategy: unknown strategy.*all_pairs"):
        graph.hyperedges(4, "pairs")


def test_incidence_keeps_the_order_of_hyperedges():
    edges = graph.incidence([[2, 0], (3,), [1, 0, 3]], 4)
    assert edges.tolist() == [[0, 2, 3, 0, 1, 3], [0, 0, 1, 2, 2, 2]]
    pairs = [[0, 1], [0, 2], [1, 2]]
    assert torch.equal(graph.incidence(pairs, 3), graph.hyperedges(3))


@pytest.mark.parametrize(
    "members, match",
    [
        ([[0, 1], [1, 4]], r"hyperedge 1 has an expert id out of range; expected ids in \[0, 4\); got 4"),
        ([[-1, 1]], r"hyperedge 0 has an expert id out of range.*got -1"),
        ([[0, 1], []], r"hyperedge 1 is empty"),
        ([[0, 1], [2, 3], [3, 1, 3]], r"hyperedge 2 has an expert twice.*got \[3, 1, 3\]"),
        ([], r"no hyperedge; expected at least one"),
        ("0,1", r"not a list of hyperedges.*got 'str'"),
        ([0, 1], r"hyperedge 0 is not a list of expert ids.*got 0"),
        ([[0, 1], ["0", 1]], r"hyperedge 1 is not a list of expert ids"),
        ([[0, 1.0]], r"hyperedge 0 is not a list of expert ids"),
        ([[True, 2]], r"hyperedge 0 is not a list of expert ids"),
    ],
)
def test_incidence_says_which_hyperedge_is_wrong(members, match):
    with pytest.raises(ConfigError, match="hyperedges: " + match):
        graph.incidence(members, 4)


@pytest.mark.parametrize(
    "edges, match",
    [
        (torch.zeros(3, 4, dtype=torch.long), r"not an edge list"),
        ([[0], [1]], r"not an edge list.*list"),
        (torch.zeros(2, 1), r"must be integers.*float32"),
        (torch.tensor([[0], [5]]), r"target id out of range.*got 5"),
        (torch.tensor([[-1], [0]]), r"source id out of range.*got -1"),
    ],
)
def test_validate_names_the_problem(edges, match):
    with pytest.raises(GraphError, match=match):
        graph.validate(edges, 5)


def test_validate_order_and_sizes():
    edges = torch.tensor([[0, 1], [2, 1]])
    assert graph.validate(edges, (2, 3)) is edges
    with pytest.raises(GraphError, match="ascending"):
        graph.validate(edges, 3, sorted_by_target=True)
    graph.validate(torch.empty(2, 0, dtype=torch.long), 0)


def test_to_edges_of_a_transposed_sparse_matrix():
    adj_t = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to_sparse_csr()  # node 1 sends to node 0
    assert graph.to_edges(adj_t).tolist() == [[1], [0]]


def test_to_hetero():
    edges = {ROUTES: torch.tensor([[0, 1], [0, 2]])}
    data = graph.to_hetero({"token": 2, "expert": 3}, edges, {ROUTES: {"weight": torch.ones(2)}})
    assert data.validate()
    assert data[ROUTES].weight.tolist() == [1, 1]
    with pytest.raises(GraphError, match=r"weight: attribute of the wrong length; expected 2; got 3"):
        graph.to_hetero({"token": 2, "expert": 3}, edges, {ROUTES: {"weight": torch.ones(3)}})
    with pytest.raises(GraphError, match="unknown nodes"):
        graph.to_hetero({"token": 2}, edges)
