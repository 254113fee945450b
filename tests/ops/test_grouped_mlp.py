import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphmoe.errors import ConfigError, GraphError
from graphmoe.ops import expert_loop, grouped_mlp
from graphmoe.ops.expert_grouped_mm import apply_grouped, back_grouped
from graphmoe.ops.grouped_mlp import _forward_op


def expert(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    hidden = gate_up @ x
    if activation == "swiglu":
        gate, up = hidden.chunk(2)
        return down @ (F.silu(gate) * up)
    return down @ F.gelu(hidden)


def oracle(x: Tensor, gate_up: Tensor, down: Tensor, case: "Case", weight: Tensor | None) -> Tensor:
    """Rows ``[N, k, D_out]``, one token and one slot at a time."""
    tokens = []
    for n, experts in enumerate(case.experts.tolist()):
        slots = []
        for slot, e in enumerate(experts):
            if e == down.size(0):
                slots.append(x.new_zeros(down.size(1)))
                continue
            row = expert(x[n], gate_up[e], down[e], case.activation)
            slots.append(row if weight is None else weight[n, slot] * row)
        tokens.append(torch.stack(slots))
    out = torch.stack(tokens) if tokens else x.new_zeros(*case.experts.shape, down.size(1))
    return out + 0 * sum(leaf.sum() for leaf in (x, gate_up, down, weight) if leaf is not None)


class Case:
    """Random operands, and the routing ``experts [N, k]`` (``E``: absent) sorted by expert."""

    def __init__(self, experts: Tensor, *, num_experts: int, channels=5, width=7, out=5, activation="swiglu"):
        halves = 2 if activation == "swiglu" else 1
        self.experts, self.activation = experts, activation
        self.x = torch.randn(experts.size(0), channels, dtype=torch.float64)
        self.gate_up = torch.randn(num_experts, halves * width, channels, dtype=torch.float64)
        self.down = torch.randn(num_experts, out, width, dtype=torch.float64)
        self.weight = torch.rand(experts.shape, dtype=torch.float64)
        ordered, self.perm = experts.flatten().sort(stable=True)
        self.token = self.perm // max(experts.size(1), 1)
        self.ptr = torch.searchsorted(ordered, torch.arange(num_experts + 1))

    def leaves(self, dtype=torch.float64) -> list[Tensor]:
        parts = (self.x, self.gate_up, self.down, self.weight)
        return [part.to(dtype).requires_grad_() for part in parts]

    def call(self, x, gate_up, down, weight, **kwargs) -> Tensor:
        if weight is not None:
            weight = weight.flatten().index_select(0, self.perm)
        kwargs = {"token": self.token, "activation": self.activation, **kwargs}
        return grouped_mlp(x, gate_up, down, self.ptr, weight=weight, **kwargs)


def route(nodes: int, k: int, num_experts: int, *, skew: float = 0.0, absent: float = 0.0) -> Tensor:
    """Distinct experts a token; ``skew`` prefers low ids, ``absent`` is the share of sentinels."""
    scores = torch.rand(nodes, num_experts) - skew * torch.arange(num_experts)
    experts = scores.argsort(dim=1, descending=True)[:, :k]
    return experts.masked_fill(torch.rand(nodes, k) < absent, num_experts)


def results(function, leaves: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a fixed scalar of it."""
    out = function(*leaves)
    scalar = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    live = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(scalar, live)]


def assert_equal(first: list[Tensor], second: list[Tensor], tol: float = 1e-12) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


CASES = {
    "one expert": (route, {"nodes": 4, "k": 1, "num_experts": 1}),
    "all experts": (route, {"nodes": 6, "k": 3, "num_experts": 3}),
    "top-2 of 8": (route, {"nodes": 9, "k": 2, "num_experts": 8}),
    "uneven, with idle experts": (route, {"nodes": 11, "k": 2, "num_experts": 8, "skew": 0.4}),
    "absent edges": (route, {"nodes": 9, "k": 3, "num_experts": 8, "absent": 0.5}),
    "one node": (route, {"nodes": 1, "k": 2, "num_experts": 3}),
    "no node": (route, {"nodes": 0, "k": 2, "num_experts": 3}),
    "no edge": (route, {"nodes": 4, "k": 2, "num_experts": 3, "absent": 1.0}),
}
ROUTES = pytest.mark.parametrize("name", CASES)
ACTIVATIONS = pytest.mark.parametrize("activation", ["swiglu", "gelu"])


def make(name: str, **kwargs) -> Case:
    function, options = CASES[name]
    return Case(function(**options), num_experts=options["num_experts"], **kwargs)


@ROUTES
@ACTIVATIONS
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 1, 1), (8, 16, 8)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_sum_by_node_equals_double_loop(name, activation, sizes, weighted):
    channels, width, out = sizes
    case = make(name, channels=channels, width=width, out=out, activation=activation)
    leaves = case.leaves()[: None if weighted else 3] + [None] * (not weighted)
    slow = results(lambda x, g, d, w: oracle(x, g, d, case, w).sum(dim=1), leaves)
    assert_equal(results(lambda *a: case.call(*a, reduce=True), leaves), slow)
    assert_equal(results(lambda *a: case.call(*a, reduce=True, perm=case.perm), leaves), slow)


@ROUTES
@ACTIVATIONS
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_equal_double_loop(name, activation, weighted):
    case = make(name, activation=activation)
    leaves = case.leaves()[: None if weighted else 3] + [None] * (not weighted)

    def slow(x, gate_up, down, weight):
        return oracle(x, gate_up, down, case, weight).flatten(0, 1).index_select(0, case.perm)

    def gathered(x, gate_up, down, weight):
        return case.call(x.index_select(0, case.token), gate_up, down, weight, token=None)

    expected = results(slow, leaves)
    assert_equal(results(case.call, leaves), expected)
    assert_equal(results(gathered, leaves), expected)


@ROUTES
@ACTIVATIONS
@pytest.mark.parametrize("reduce", [True, False])
def test_gradcheck(name, activation, reduce):
    case = make(name, channels=2, width=3, out=2, activation=activation)
    assert torch.autograd.gradcheck(lambda *a: case.call(*a, reduce=reduce), case.leaves(), fast_mode=True)


@ACTIVATIONS
def test_runs_of_any_size_agree(monkeypatch, activation):
    case = Case(route(60, 2, 4, skew=0.3), num_experts=4, activation=activation)
    whole = results(lambda *a: case.call(*a, reduce=True), case.leaves())
    monkeypatch.setattr(expert_loop, "RUN_ROWS", 7)
    monkeypatch.setattr(expert_loop, "RUN_VALUES", 1)
    runs = expert_loop.make_runs(case.ptr.tolist(), 7)
    assert max(run[-1][2] - run[0][1] for run in runs) <= 7
    covered = [piece for run in runs for piece in run]
    assert [low for _, low, _ in covered] == [0] + [high for *_, high in covered[:-1]]
    assert_equal(results(lambda *a: case.call(*a, reduce=True), case.leaves()), whole)


@ACTIVATIONS
@pytest.mark.parametrize("nodes", [1, 2, 12])
def test_products_of_few_rows_agree_with_those_of_many(monkeypatch, activation, nodes):
    case = Case(route(nodes, 2, 4), num_experts=4, activation=activation)
    monkeypatch.setattr(expert_loop, "FEW_ROWS", 0)
    many = results(lambda *a: case.call(*a, reduce=True), case.leaves())
    monkeypatch.setattr(expert_loop, "FEW_ROWS", 1000)
    assert_equal(results(lambda *a: case.call(*a, reduce=True), case.leaves()), many)


@ACTIVATIONS
@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
def test_strips_of_any_size_agree(monkeypatch, activation, rows):
    case = Case(route(60, 2, 4, skew=0.3), num_experts=4, activation=activation)
    whole = results(lambda *a: case.call(*a, reduce=True), case.leaves())
    monkeypatch.setattr(expert_loop, "STRIP_VALUES", rows * 7 // torch.get_num_threads())
    strips = list(expert_loop._strips(torch.empty(60, 7)))
    assert len(strips) >= 60 // rows and [s.stop for s in strips[:-1]] == [s.start for s in strips[1:]]
    assert (strips[0].start, strips[-1].stop) == (0, 60)
    assert_equal(results(lambda *a: case.call(*a, reduce=True), case.leaves()), whole)


@ROUTES
@ACTIVATIONS
@pytest.mark.parametrize("reduce", [True, False])
def test_uninitialised_memory_never_shows(monkeypatch, name, activation, reduce):
    def poisoned(like, *shape):
        return like.new_full(shape, float("nan"))

    case = make(name, activation=activation)
    clean = results(lambda *a: case.call(*a, reduce=reduce), case.leaves())
    monkeypatch.setattr(expert_loop, "empty", poisoned)
    monkeypatch.setattr(sys.modules[grouped_mlp.__module__], "empty", poisoned)
    assert_equal(results(lambda *a: case.call(*a, reduce=reduce), case.leaves()), clean, tol=0)


def test_idle_experts_get_zero_gradients_and_absent_rows_nothing():
    experts = torch.tensor([[1, 3], [3, 4], [4, 4]])
    case = Case(experts, num_experts=4)
    x, gate_up, down, weight = leaves = case.leaves()
    case.call(*leaves).square().sum().backward()
    for parameter in (gate_up, down):
        assert parameter.grad.flatten(1).any(dim=1).tolist() == [False, True, False, True]
    assert x.grad.any(dim=1).tolist() == [True, True, False]
    assert weight.grad.bool().tolist() == [[True, True], [True, False], [False, False]]
    assert not case.call(*leaves)[case.ptr[-1] :].any()


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("reduce", [True, False])
def test_low_precision_stays_close(dtype, tol, reduce):
    case = Case(route(40, 2, 4), num_experts=4, channels=16, width=32, out=16)
    for part in ("x", "gate_up", "down", "weight"):
        setattr(case, part, getattr(case, part).to(dtype).double())  # the same operands for both
    exact = results(lambda *a: case.call(*a, reduce=reduce), case.leaves())
    rough = results(lambda *a: case.call(*a, reduce=reduce), case.leaves(dtype))
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tol * b.abs().max()


def test_routing_weight_keeps_its_dtype():
    case = Case(route(12, 2, 4), num_experts=4, channels=8, width=8, out=8)
    x, gate_up, down, _ = case.leaves(torch.bfloat16)
    weight = case.weight.float().requires_grad_()
    out = case.call(x, gate_up, down, weight, reduce=True)
    out.sum().backward()
    assert (out.dtype, weight.grad.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_autocast_casts_like_a_linear_layer():
    case = Case(route(12, 2, 4), num_experts=4, channels=8, width=8, out=8)
    leaves = case.leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.call(*leaves, reduce=True)
    x, gate_up, down = (leaf.bfloat16() for leaf in leaves[:3])
    assert torch.equal(out, case.call(x, gate_up, down, leaves[3], reduce=True))
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_expanded_and_transposed_gradients():
    case = Case(route(9, 2, 4), num_experts=4)
    x, gate_up, down, weight = case.leaves()
    out = case.call(x, gate_up, down, weight)
    expanded = torch.ones((), dtype=torch.float64).expand_as(out)
    got = torch.autograd.grad(out, (x, gate_up), expanded, retain_graph=True)
    assert_equal(got, torch.autograd.grad(out, (x, gate_up), expanded.contiguous(), retain_graph=True), tol=0)
    turned = torch.randn(out.size(1), out.size(0), dtype=torch.float64).t()
    got = torch.autograd.grad(out, (x, gate_up), turned, retain_graph=True)
    assert_equal(got, torch.autograd.grad(out, (x, gate_up), turned.contiguous()), tol=0)


def test_strided_operands():
    case = Case(route(9, 2, 4), num_experts=4)
    leaves = case.leaves()
    expected = results(lambda *a: case.call(*a, reduce=True), leaves)

    def strided(x, gate_up, down, weight):
        turned = (part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in (x, gate_up, down))
        return case.call(*turned, weight, reduce=True)

    assert_equal(results(strided, leaves), expected)


def test_inference_keeps_nothing_and_changes_nothing():
    case = Case(route(9, 2, 4), num_experts=4)
    leaves = case.leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trained = case.call(*leaves, reduce=True)
        hidden = 2 * 7 * 18  # gate and up, F values each, of 18 rows
        assert sum(t.numel() == hidden for t in kept) == 1
        kept.clear()
        frozen = case.call(*(leaf.detach() for leaf in leaves), reduce=True)
    assert not kept and not frozen.requires_grad
    assert torch.equal(frozen, trained)


def test_checkpointing_gives_the_same_gradients():
    case = Case(route(9, 2, 4), num_experts=4)

    def checkpointed(*leaves):
        return checkpoint(lambda *a: case.call(*a, reduce=True), *leaves, use_reentrant=False)

    assert_equal(
        results(checkpointed, case.leaves()),
        results(lambda *a: case.call(*a, reduce=True), case.leaves()),
        tol=0,
    )


def test_same_bits_every_time():
    case = Case(route(64, 3, 8, skew=0.1), num_experts=8)
    runs = [results(lambda *a: case.call(*a, reduce=True), case.leaves(torch.float32)) for _ in range(3)]
    assert_equal(runs[0], runs[1], tol=0)
    assert_equal(runs[0], runs[2], tol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduce", [True, False])
def test_compiles_to_one_graph(dynamic, reduce):
    case = Case(route(12, 2, 4, absent=0.2), num_experts=4, channels=4, width=8, out=4)

    def call(*leaves):
        return case.call(*leaves, reduce=reduce, perm=case.perm if reduce else None)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_equal(results(compiled, case.leaves()), results(call, case.leaves()), tol=0)


def test_compiles_under_autocast():
    case = Case(route(12, 2, 4), num_experts=4, channels=8, width=8, out=8)

    def call(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.call(*leaves, reduce=True)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = case.leaves(torch.float32)
    assert_equal(results(compiled, leaves), results(call, leaves), tol=0)


def test_operator_registration():
    # No absent rows: their hidden rows are not written, so that two calls may differ in them.
    case = Case(route(12, 2, 4), num_experts=4)
    x, gate_up, down, weight = case.leaves()
    weight = weight.detach().flatten()[case.perm].requires_grad_()
    order, bounds = case.perm.argsort(), torch.arange(13) * 2
    for routing in ((case.token, weight, order, bounds, True), (case.token, None, order, bounds, False)):
        torch.library.opcheck(_forward_op, (x, gate_up, down, case.ptr, *routing, "swiglu", True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "no node"])  # it needs a row
@ACTIVATIONS
def test_grouped_mm_form_equals_loop(name, activation):
    case = make(name, channels=8, width=16, out=8, activation=activation)
    gate_up, down = case.gate_up.float(), case.down.float()
    rows = case.x.float().index_select(0, case.token)
    shared = (gate_up, down, case.ptr)
    out, hidden = apply_grouped(rows, *shared, activation, True)
    expected, planes = expert_loop.apply_loop(rows, *shared, activation, True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(out)
    scaled = grad * torch.rand(rows.size(0), 1)
    got = back_grouped(grad, scaled, rows, *shared, hidden, activation)
    for a, b in zip(got, expert_loop.back_loop(grad, scaled, rows, *shared, planes, activation), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-2), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("reduce", [True, False])
def test_cuda_equals_cpu(dtype, tol, reduce):
    case = Case(route(64, 2, 8, skew=0.3, absent=0.1), num_experts=8, channels=16, width=32, out=16)
    for part in ("x", "gate_up", "down", "weight"):
        setattr(case, part, getattr(case, part).to(dtype).double())
    exact = results(lambda *a: case.call(*a, reduce=reduce), case.leaves())
    for part in ("x", "gate_up", "down", "weight", "perm", "token", "ptr"):
        setattr(case, part, getattr(case, part).cuda())
    found = results(
        lambda *a: case.call(*a, reduce=reduce), [p.detach().requires_grad_() for p in case.leaves(dtype)]
    )
    for a, b in zip(found, exact, strict=True):
        assert (a.double().cpu() - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"activation": "relu"}, ConfigError, "unknown activation; expected one of swiglu, gelu"),
        ({"token": None, "reduce": True}, ConfigError, "token: rows are summed by node"),
        ({"gate_up": torch.zeros(4, 13, 5)}, ConfigError, r"gate_up_proj: .* expected \(4, 14, 5\)"),
        ({"x": torch.zeros(9, 6)}, ConfigError, r"gate_up_proj: .* expected \(4, 14, 6\)"),
        ({"ptr": torch.tensor([0, 4, 18])}, GraphError, r"ptr: .* got \(3,\)"),
        ({"ptr": torch.tensor([0, 9, 4, 12, 18])}, GraphError, "ptr: offsets do not ascend"),
        (
            {"ptr": torch.tensor([0, 4, 9, 12, 19])},
            GraphError,
            "ptr: .* within the rows; expected 0 <= ... <= 18",
        ),
        ({"ptr": torch.tensor([1, 4, 9, 12, 18])}, GraphError, "ptr: offsets do not ascend"),
    ],
)
def test_wrong_input(change, error, match):
    case = Case(route(9, 2, 4), num_experts=4)
    parts = {"x": case.x, "gate_up": case.gate_up, "down": case.down, "ptr": case.ptr, "token": case.token}
    x, gate_up, down, ptr, token = (change.pop(name, part) for name, part in parts.items())
    with pytest.raises(error, match=match):
        grouped_mlp(x, gate_up, down, ptr, token=token, **change)
