"""Every layer on graphs as users of PyG have them: any layout, several types of nodes, hooks, compilers."""

import contextlib

import pytest
import torch
from contract import assert_every_parameter_learns, assert_same
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import GCNConv, HeteroConv
from torch_geometric.testing import assert_module
from torch_geometric.utils import to_torch_coo_tensor, to_torch_csc_tensor, to_torch_csr_tensor

from graphmoe.errors import ConfigError, GraphError
from graphmoe.graph import to_edges, validate, weighted_edges
from graphmoe.nn import (
    AttendConv,
    CollabConv,
    CoupleConv,
    ExpertConv,
    GatedFusion,
    HyperCoupleConv,
    IterativeExpert,
    MoELayer,
    ProjectedFusion,
    RowAttention,
    SumFusion,
    edge_form,
)

N, D = 7, 12
# Node 5 hears nobody, node 6 is alone.
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 3], [1, 2, 3, 4, 0, 0, 3, 1, 3]])

# Convolutions from nodes to nodes of the same graph.
CONVS = {
    "couple": lambda: CoupleConv(D),
    "collab": lambda: CollabConv(D, heads=3),
    "rows": lambda: RowAttention(D, heads=3),
    "attend": lambda: AttendConv(D, heads=4, kv_heads=2),
    "hyper": lambda: HyperCoupleConv(D),  # here nodes are their own hyperedges' ids
}
WEIGHTED = ("couple", "collab", "rows")


@pytest.fixture(params=CONVS)
def conv(request, double):
    return CONVS[request.param]()


@pytest.fixture
def x(double):
    return torch.randn(N, D)


# Layouts of an adjacency ------------------------------------------------------------------------


def test_edges_in_any_order_and_layout(conv, x):
    """PyG's own check: shape, order of edges, and sparse layouts."""
    size = {"sparse_size": (N, N)}
    if isinstance(conv, HyperCoupleConv):
        size = {"sparse_size": (N, N), "edge_weight": torch.rand(N)}
        assert_module(conv, x, EDGES, expected_size=(N, D), test_edge_permutation=False, **size)
        order = torch.randperm(EDGES.size(1))
        same = conv(x, EDGES, edge_weight=size["edge_weight"])
        torch.testing.assert_close(conv(x, EDGES[:, order], edge_weight=size["edge_weight"]), same)
    else:
        assert_module(conv, x, EDGES, expected_size=(N, D), **size)
    for make in (to_torch_csr_tensor, to_torch_csc_tensor, to_torch_coo_tensor):
        adj_t = make(EDGES.flip(0), size=(N, N))
        torch.testing.assert_close(conv(x, adj_t), conv(x, EDGES), rtol=1e-12, atol=1e-12)


def test_edge_index_of_every_order(conv, x):
    want = conv(x, EDGES)
    plain = EdgeIndex(EDGES, sparse_size=(N, N))
    for edges in (plain, plain.sort_by("row")[0], plain.sort_by("col")[0], EdgeIndex(EDGES)):
        torch.testing.assert_close(conv(x, edges), want, rtol=1e-12, atol=1e-12)
    back = plain.sort_by("row")[0].flip(0)
    torch.testing.assert_close(conv(x, back), conv(x, EDGES.flip(0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv(x, EDGES.int()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["couple", "rows", "attend"])
def test_the_other_flow_is_the_reversed_graph(name, double):
    conv, x = CONVS[name](), torch.randn(N, D)
    kind, options = type(conv), {} if name == "couple" else {"heads": conv.heads}
    options |= {"kv_heads": conv.kv_heads} if name == "attend" else {}
    back = kind(D, **options, flow="target_to_source")
    back.load_state_dict(conv.state_dict())
    torch.testing.assert_close(back(x, EDGES), conv(x, EDGES.flip(0)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(back(x, EDGES), conv(x, EDGES))
    with pytest.raises(ConfigError, match="flow: a hypergraph has no direction to reverse"):
        HyperCoupleConv(D, flow="target_to_source")


@pytest.mark.parametrize("name", WEIGHTED)
def test_values_of_a_sparse_matrix_are_weights(name, x):
    conv, weight = CONVS[name](), torch.rand(EDGES.size(1)) + 0.5
    want = conv(x, EDGES, edge_weight=weight)
    assert not torch.allclose(want, conv(x, EDGES))
    for make in (to_torch_csr_tensor, to_torch_csc_tensor, to_torch_coo_tensor):
        adj_t = make(EDGES.flip(0), weight, size=(N, N))
        torch.testing.assert_close(conv(x, adj_t), want, rtol=1e-12, atol=1e-12)
    edges, values = weighted_edges(adj_t, None, N)
    torch.testing.assert_close(conv(x, edges, edge_weight=values), want, rtol=1e-12, atol=1e-12)
    given = torch.ones(EDGES.size(1))  # weights of one's own count more, in the order of the matrix
    torch.testing.assert_close(conv(x, adj_t, edge_weight=given), conv(x, EDGES), rtol=1e-12, atol=1e-12)


def test_rows_of_experts_and_back(double):
    """Token -> row and row -> token: bipartite by nature."""
    x, ids = torch.randn(4, D), torch.tensor([2, 0, 1, 2, 3, 3])  # expert 3 of 3: absent
    routes = torch.tensor([[0, 0, 1, 2, 3, 3], [0, 1, 2, 3, 4, 5]])
    for conv in (ExpertConv(D, 5, 3), IterativeExpert(D, 5, 3, steps=2)):
        assert_module(conv, x, routes, expected_size=(6, D), sparse_size=(4, 6), expert=ids,
                      test_edge_permutation=False)  # fmt: skip
        rows = conv(x, routes, ids)
        torch.testing.assert_close(conv(x, routes[:, [3, 1, 5, 0, 2, 4]], ids), rows)
        torch.testing.assert_close(conv((x, None), routes, (None, ids)), rows)
        assert (rows[4:] == 0).all()
    weight = torch.rand(6) * (ids < 3)
    for fusion in (SumFusion(), ProjectedFusion(D), GatedFusion(D)):
        want = fusion(rows, routes.flip(0), weight, 4)
        assert want.shape == (4, D) and (want[3] == 0).all()  # nobody serves the last token
        torch.testing.assert_close(fusion((rows, x), routes.flip(0), weight), want)
        for make in (to_torch_csr_tensor, to_torch_csc_tensor, to_torch_coo_tensor):
            torch.testing.assert_close(fusion(rows, make(routes, weight, size=(4, 6)), None, 4), want)
        ones = torch.ones(6)
        torch.testing.assert_close(fusion((rows, x), routes.flip(0)), fusion((rows, x), routes.flip(0), ones))
        with pytest.raises(GraphError, match=r"num_tokens: how many tokens\?"):
            fusion(rows, routes.flip(0), weight)
        with pytest.raises(GraphError, match=r"source id out of range; expected ids in \[0, 6\); got 6"):
            fusion(rows, torch.tensor([[6], [0]]), weight[:1], 4)
    with pytest.raises(GraphError, match=r"target id out of range; expected ids in \[0, 6\); got 9"):
        conv(x, torch.tensor([[0], [9]]), ids)


# What is no graph -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, match",
    [
        (torch.tensor([[0], [7]]), r"edge_index: target id out of range; expected ids in \[0, 7\); got 7"),
        (torch.tensor([[7], [0]]), r"source id out of range; expected ids in \[0, 7\); got 7"),
        (torch.tensor([[-1], [0]]), "source id out of range.*got -1"),
        (torch.tensor([[0], [-3]]), "target id out of range.*got -3"),
        (torch.zeros(3, 4, dtype=torch.long), r"not an edge list; expected a tensor \[2, M\].*got \(3, 4\)"),
        (torch.rand(N, N), "not an edge list.*dense_to_sparse"),
        (torch.rand(2, 3), "must be integers.*float"),
        (torch.zeros(2, 3, dtype=torch.bool), "must be integers.*bool"),
        ([[0], [1]], "not an edge list.*got 'list'"),
        (EdgeIndex(torch.tensor([[0], [9]])), "target id out of range.*got 9"),
        (torch.eye(5).to_sparse_csr(), r"adj_t: sparse matrix of another size.*\[7, 7\].*got \[5, 5\]"),
    ],
)
def test_what_is_no_graph(conv, x, bad, match):
    # Hyperedges are as many as their weights; without weights, as many as there are.
    options = {"edge_weight": torch.ones(N)} if isinstance(conv, HyperCoupleConv) else {}
    with pytest.raises(GraphError, match=match):
        conv(x, bad, **options)


def test_border_of_the_graph_module():
    assert to_edges(EDGES) is EDGES
    assert type(to_edges(EdgeIndex(EDGES))) is torch.Tensor
    with pytest.raises(GraphError, match=r"source id out of range; expected ids in \[0, 3\); got 3"):
        to_edges(torch.tensor([[3], [3]]), (3, 4))
    to_edges(torch.tensor([[2], [3]]), (3, 4))
    to_edges(torch.empty(2, 0, dtype=torch.long), 0)
    empty = torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.long), torch.empty(0), (4, 3))
    assert to_edges(empty, (3, 4)).shape == (2, 0)
    with pytest.raises(GraphError, match=r"expected ids in \[0, 0\); got 0"):
        validate(torch.zeros(2, 1, dtype=torch.long), 0)


# Laws -----------------------------------------------------------------------------------------


def test_follows_the_names_of_nodes(conv, x):
    order = torch.randperm(N)
    place = order.argsort()  # where each node went
    if isinstance(conv, HyperCoupleConv):  # hyperedges keep their names
        moved = torch.stack([place[EDGES[0]], EDGES[1]])
    else:
        moved = place[EDGES]
    torch.testing.assert_close(conv(x[order], moved), conv(x, EDGES)[order], rtol=1e-12, atol=1e-12)


def test_graphs_of_a_batch_are_alone(conv):
    graphs = [
        Data(x=torch.randn(n, D), edge_index=torch.randint(n, (2, m))) for n, m in ((3, 5), (1, 2), (4, 0))
    ]
    if isinstance(conv, HyperCoupleConv):
        # Hyperedges are numbered like nodes here, which a batch then offsets alike.
        alone = [conv(g.x, g.edge_index, edge_weight=torch.ones(len(g.x))) for g in graphs]
        batch = Batch.from_data_list(graphs)
        together = conv(batch.x, batch.edge_index, edge_weight=torch.ones(len(batch.x)))
    else:
        alone = [conv(g.x, g.edge_index) for g in graphs]
        batch = Batch.from_data_list(graphs)
        together = conv(batch.x, batch.edge_index)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_no_edges_and_no_nodes(conv):
    none = torch.empty(2, 0, dtype=torch.long)
    for nodes in (N, 1, 0):
        x = torch.randn(nodes, D, requires_grad=True)
        forms = [none, torch.sparse_coo_tensor(none, torch.empty(0), (nodes, nodes))]
        for edges in forms:
            out = conv(x, edges)
            assert out.shape == (nodes, D) and out.isfinite().all()
            out.sum().backward()
            assert x.grad.isfinite().all()
    if isinstance(conv, CoupleConv | CollabConv | RowAttention):
        for nodes in (0, 1):
            x = torch.randn(nodes, D, requires_grad=True)
            conv(x).sum().backward()
            with edge_form(conv):
                assert conv(x).shape == (nodes, D)


ROUTERS = [
    ("topk", {}),
    ("topk", {"scoring_func": "sigmoid", "bias": True}),
    ("contextual", {}),
    ("expert_choice", {}),
    ("expert_choice", {"capacity_factor": 1.5, "norm_topk_prob": True}),
    ("threshold", {}),
]
COUPLINGS = [
    ("none", {}),
    ("gnn", {}),
    ("hyper", {}),
    ("hyper", {"hyperedges": [[0, 1, 2], [2, 3]]}),
    ("collab", {"coupling_kwargs": {"mediator": True, "heads": 3}, "fusion": "gated"}),
]


def mixture(router, router_kwargs, coupling="none", options=None, **more):
    options = {**(options or {}), **more}
    return MoELayer(
        D, 4, 3, hidden_channels=6, router=router, router_kwargs=router_kwargs, coupling=coupling, **options
    )


@pytest.mark.parametrize("router, router_kwargs", ROUTERS)
@pytest.mark.parametrize("coupling, options", COUPLINGS)
def test_a_mixture_on_the_nodes_of_a_batch(router, router_kwargs, coupling, options, double):
    """Nodes may be renamed, graphs batched, a graph may have one node or none of a type."""
    layer = mixture(router, router_kwargs, coupling, options)
    sizes = (6, 1, 9)
    x = torch.randn(sum(sizes), D)
    batch = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    together = layer(x, batch)
    alone = torch.cat([layer(part) for part in x.split(sizes)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    order = torch.randperm(len(x))
    torch.testing.assert_close(layer(x[order], batch[order]), together[order], rtol=1e-12, atol=1e-12)
    # Ids of graphs need not be dense: a batch may have graphs without nodes of this type.
    torch.testing.assert_close(layer(x, 5 * batch + 2), together, rtol=1e-12, atol=1e-12)
    for form in (contextlib.nullcontext(), edge_form(layer)):
        for no_batch in (None, batch[:0]):
            none = torch.randn(0, D, requires_grad=True)
            with form if no_batch is None else contextlib.nullcontext():
                out, record = layer(none, no_batch, return_record=True)
            assert out.shape == (0, D) and int(record.routing.ptr[-1]) == 0
            out.sum().backward()
            assert none.grad.shape == (0, D)


@pytest.mark.parametrize("router, router_kwargs", ROUTERS)
@pytest.mark.parametrize("coupling, options", [c for c in COUPLINGS if "hyperedges" not in c[1]])
def test_experts_may_be_renamed(router, router_kwargs, coupling, options, double):
    first, second = (mixture(router, router_kwargs, coupling, options) for _ in range(2))
    order = torch.randperm(4)
    state = first.state_dict()
    for key, value in state.items():
        if key.endswith("adjacency"):
            state[key] = value[order][:, order]
        elif key.endswith(("incidence", "hyperedge_index")) or key == "couplers.0.weight":
            continue  # pairs of experts, all of equal weight at the start
        elif value.dim() and value.size(0) == 4:
            state[key] = value[order]
    second.load_state_dict(state)
    x = torch.randn(11, D)
    torch.testing.assert_close(second(x), first(x), rtol=1e-12, atol=1e-12)


def test_a_pair_is_no_input_of_a_mixture(x):
    with pytest.raises(GraphError, match=r"x: a mixture serves nodes.*got 'tuple'"):
        mixture("topk", {})((x, x))


# Several types of nodes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["couple", "rows", "attend"])
def test_sources_and_targets_apart(name, double):
    """A bipartite graph equals the graph of both sides together, seen from the targets."""
    conv = CONVS[name]()
    source, target = torch.randn(5, D, requires_grad=True), torch.randn(3, D, requires_grad=True)
    edges = torch.tensor([[0, 4, 2, 2, 1], [0, 0, 2, 0, 2]])  # the second target hears nobody
    joint = torch.stack([edges[0], edges[1] + 5])
    assert_same(
        conv,
        [source, target],
        lambda: conv((source, target), edges),
        lambda: conv(torch.cat([source, target]), joint)[5:],
    )
    assert_module(conv, (source, target), edges, expected_size=(3, D))
    adj_t = to_torch_csr_tensor(edges.flip(0), size=(3, 5))
    torch.testing.assert_close(conv((source, target), adj_t), conv((source, target), edges))
    with pytest.raises(GraphError, match=r"source id out of range; expected ids in \[0, 3\); got 4"):
        conv((target, source), edges)
    with pytest.raises(GraphError, match=r"needs features of sources and of targets.*\(x_src, x_dst\)"):
        conv((source, None), edges)
    with pytest.raises(GraphError, match="sources and targets"):
        conv((source, target))


def test_hetero_conv(double):
    x = {"paper": torch.randn(5, D), "author": torch.randn(4, D)}
    edges = {
        ("author", "writes", "paper"): torch.tensor([[0, 1, 3, 3], [0, 4, 2, 1]]),
        ("paper", "by", "author"): torch.tensor([[0, 4, 2], [0, 1, 3]]),
        ("paper", "cites", "paper"): torch.tensor([[0, 1, 2], [1, 2, 0]]),
    }
    kinds = (lambda: CoupleConv(-1), lambda: AttendConv(-1, heads=3), lambda: CollabConv(-1, heads=2))
    model = HeteroConv(dict(zip(edges, (kind() for kind in kinds), strict=True)))
    out = model(x, edges)
    assert out["paper"].shape == (5, D) and out["author"].shape == (4, D)
    convs = list(model.convs.values())
    want = convs[0]((x["author"], x["paper"]), edges["author", "writes", "paper"]) + convs[2](
        x["paper"], edges["paper", "cites", "paper"]
    )
    torch.testing.assert_close(out["paper"], want)
    for conv, match in (
        (CollabConv(D, heads=2), "in rounds every node hears and speaks"),
        (HyperCoupleConv(D), "hyperedges have no features"),
    ):
        with pytest.raises(GraphError, match=f"x: {match}.*got 'tuple'"):
            HeteroConv({("author", "writes", "paper"): conv})(x, edges)


def test_the_relations_of_a_mixture_as_a_hetero_conv(double):
    """Routes and returns of a mixture, built by hand on a typed graph, give what the layer gives."""
    layer = mixture("topk", {})
    x = torch.randn(6, D)
    out, record = layer(x, return_record=True)
    routing, row = record.routing, torch.arange(18)
    routes = HeteroConv({("token", "routes", "row"): layer.experts})
    rows = routes(
        {"token": x, "row": x.new_empty(18, 0)},
        {("token", "routes", "row"): torch.stack([routing.token, row])},
        expert_dict={"row": routing.expert},
    )["row"]
    returns = HeteroConv({("row", "returns", "token"): layer.fusion})
    back = returns(
        {"row": rows, "token": x},
        {("row", "returns", "token"): torch.stack([row, routing.token])},
        edge_weight_dict={("row", "returns", "token"): routing.weight},
    )["token"]
    torch.testing.assert_close(back, out, rtol=1e-12, atol=1e-12)


# Explanations, hooks, compilers ---------------------------------------------------------------


class Net(torch.nn.Module):
    """A GNN whose convolutions and whose feed-forward layer are ours."""

    def __init__(self, conv, **options):
        super().__init__()
        self.first, self.moe, self.conv, self.last = (
            GCNConv(D, D),
            MoELayer(-1, 4, 3, **options),
            conv,
            GCNConv(D, 2),
        )

    def forward(self, x, edge_index):
        x = self.moe(self.first(x, edge_index).relu())
        return self.last(self.conv(x, edge_index), edge_index)


@pytest.mark.parametrize("name", ["couple", "collab", "rows", "attend"])
def test_explainer(name, x):
    model = Net(CONVS[name](), coupling="hyper", router="expert_choice")
    model(x, EDGES)
    explainer = Explainer(
        model,
        GNNExplainer(epochs=4),
        explanation_type="model",
        node_mask_type="attributes",
        edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
    )
    before = model(x, EDGES)
    explanation = explainer(x, EDGES)
    assert explanation.edge_mask.shape == (EDGES.size(1),) and explanation.edge_mask.max() > 0
    assert explanation.node_mask.shape == x.shape
    torch.testing.assert_close(model(x, EDGES), before)
    # The mask reaches the messages of our conv: with nothing passing, a node is as if it had no edges.
    conv = CONVS[name]()
    inner = conv.attention if name == "collab" else conv
    inner.explain, inner._edge_mask, inner._apply_sigmoid = True, torch.zeros(EDGES.size(1)), False
    inner._loop_mask = EDGES[0] != EDGES[1]
    torch.testing.assert_close(conv(x, EDGES), conv_without_edges(conv, inner, x))


def conv_without_edges(conv, inner, x):
    inner.explain = False
    return conv(x, EDGES[:, :0])


def test_message_hooks_see_the_users_edges_and_the_edge_form(x):
    for name in ("couple", "rows", "attend"):
        conv, seen = CONVS[name](), []
        conv.register_message_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.shape))
        conv.register_propagate_forward_pre_hook(lambda module, inputs, seen=seen: seen.append("propagate"))
        conv(x, EDGES)
        assert seen[0] == "propagate" and seen[1][0] == EDGES.size(1)
    layer, seen = mixture("topk", {}, "gnn"), []
    for part in (layer.experts, layer.couplers[0], layer.fusion):
        part.register_message_forward_hook(lambda module, inputs, out: seen.append(type(module).__name__))
    want = layer(x)
    assert not seen  # fast forms form no messages
    with edge_form(layer):
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    assert seen == ["ExpertConv", "CoupleConv", "SumFusion"]
    # A hook can change the messages: without any, the coupler leaves its own term only.
    conv = CoupleConv(D)
    conv.register_message_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    torch.testing.assert_close(conv(x, EDGES), conv(x, EDGES[:, :0]))


@pytest.mark.parametrize("name", ["couple", "collab", "rows", "attend", "hyper"])
def test_compiles_on_a_graph(name, x):
    conv = CONVS[name]()
    options = {"edge_weight": torch.rand(N)} if name == "hyper" else {}
    x.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_same(conv, [x], lambda: conv(x, EDGES, **options), lambda: compiled(x, EDGES, **options))


@pytest.mark.parametrize("router", ["topk", "contextual", "expert_choice", "threshold"])
def test_compiles_inside_a_gnn(router, x):
    """In a graph of PyG's convolutions, with their self-loops made before, as one compiled graph."""
    model = Net(CoupleConv(-1), router=router, coupling="hyper")
    model(x, EDGES)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, EDGES), model(x, EDGES))
    compiled(x, EDGES).sum().backward()


def test_every_parameter_of_a_gnn_learns(x):
    model = Net(CoupleConv(-1), coupling="gnn", num_shared_experts=1)
    model(x, EDGES)
    assert_every_parameter_learns(model, model(x, EDGES).square().sum())
