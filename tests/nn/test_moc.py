"""The mixture of collaboration: how collaboration, reasoning and gated fusion meet in ``MoELayer``."""

import pytest
import reference
import torch
from contract import (
    assert_eval_changes_nothing,
    assert_every_parameter_learns,
    assert_same,
    assert_state_round_trip,
)
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from torch_geometric.nn import GCNConv, SAGEConv, to_hetero

from graphmoe.errors import ConfigError
from graphmoe.nn import MoELayer, edge_form

OPTIONS = [
    {},
    {"k": 1, "reasoning_steps": 0},
    {"k": 4, "coupling_layers": 4},
    {"mediator": False},
    {"mediator": False, "fusion": "sum", "k": 3},
    {"graph": "self"},
    {"coupling_layers": 0, "fusion": "gated", "mediator": False},
    {"num_ghosts": 2},
    {"capacity_factor": 0.5},
]


def build(*, k=2, mediator=True, graph="complete", awake=True, **options):
    settings = {"coupling": "collab", "fusion": "gated", "reasoning_steps": 2, "hidden_channels": 5}
    kwargs = {"heads": 2, "mediator": mediator, "graph": graph, "hidden_channels": 7}
    layer = MoELayer(8, 4, k, coupling_kwargs=kwargs, **(settings | options))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if layer.ghosts is not None and awake:
        layer.ghosts.phase[0], layer.ghosts.steps[0] = 2, 100
        layer.ghosts.phase[1:], layer.ghosts.steps[1:] = 1, 40
    return layer


def rms(x, gain):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain


def moc(layer, x):
    """One token, one row, one head, one round at a time, as the definition stands."""
    conv, experts, out = layer.couplers[0], layer.experts, []
    for token in x:
        logits = layer.router.weight @ token
        top = logits.topk(layer.k)
        rows = []
        for e in top.indices:
            h = token
            for _ in range(experts.steps):
                h = h + reference.expert(h + token, experts.gate_up_proj[e], experts.down_proj[e]) / (
                    experts.steps**0.5
                )
            rows.append(h - token)
        t = torch.stack([*rows, conv.mediator])
        for _ in range(conv.rounds):
            query, key, value = (t @ conv.attention.lin_qkv.weight.t()).chunk(3, dim=1)
            heads = []
            for piece in (slice(0, 4), slice(4, 8)):
                share = (query[:, piece] @ key[:, piece].t() / 4**0.5).softmax(dim=1)
                heads.append(share @ value[:, piece])
            heard = torch.cat(heads, dim=1) @ conv.attention.lin_out.weight.t()
            t = rms(t + heard, conv.attention_norm.weight)
            gate, up = (rms(t, conv.feed_forward_norm.weight) @ conv.gate_up_proj.weight.t()).chunk(2, dim=1)
            t = t + (F.silu(gate) * up) @ conv.down_proj.weight.t()
        share = torch.sigmoid(layer.fusion.gate(token))
        total = top.values.softmax(dim=0) @ t[:-1]
        out.append(layer.fusion.lin.weight @ (share * t[-1] + (1 - share) * total))
    return torch.stack(out)


def test_oracle(double):
    layer, x = build(), torch.randn(6, 8)
    torch.testing.assert_close(layer(x), moc(layer, x))
    with edge_form(layer):
        torch.testing.assert_close(layer(x), moc(layer, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_edge_form_equals_fast_form(options, double):
    layer, x = build(**options), torch.randn(2, 7, 8, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False

    def edge():
        with edge_form(layer):
            return layer(x, mask=mask)

    assert_same(layer, [x], lambda: layer(x, mask=mask), edge, tol=1e-11)
    assert (layer(x, mask=mask)[0, :3] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contract(options):
    layer, x = build(**options), torch.randn(40, 8)
    assert_state_round_trip(layer.eval(), build(**options).eval(), lambda m: m(x))
    assert_eval_changes_nothing(layer, lambda: layer(x, return_record=True))
    # The weight of one expert alone is 1 whatever its score: the router then learns from its own losses.
    out, record = layer.train()(x, return_record=True)
    assert_every_parameter_learns(layer, out.pow(3).sum() + record.routing.logits.square().mean())
    assert layer(x[:0]).shape == (0, 8)


def test_tokens_do_not_hear_one_another(double):
    layer, x = build().eval(), torch.randn(9, 8)
    whole = layer(x)
    for n in range(9):
        torch.testing.assert_close(layer(x[n : n + 1]), whole[n : n + 1], rtol=0, atol=1e-13)


def test_order_of_slots_does_not_matter(double):
    """The rows of a token are a set: relabelled experts give the same output."""
    layer, x = build(), torch.randn(9, 8)
    before, turn = layer(x), torch.tensor([2, 0, 3, 1])
    for parameter in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        parameter.data = parameter.data[turn]
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)


def test_a_row_that_was_dropped_is_not_heard(double):
    """Only tokens that lost a row change, and as if that expert had never been chosen."""
    layer, x = build(capacity_factor=0.5), torch.randn(20, 8)
    out, record = layer(x, return_record=True)
    lost = record.overflow.any(dim=1)
    assert lost.any() and not lost.all()
    twin = build(k=1)
    twin.load_state_dict(layer.state_dict())
    one_left = record.overflow.sum(dim=1) == 1
    kept = {int(n): int(e) for n, e in zip(record.routing.token, record.routing.expert, strict=True) if e < 4}
    weight = dict(zip(record.routing.token.tolist(), record.routing.weight.tolist(), strict=True))
    for n in one_left.nonzero().flatten().tolist():
        twin.router.weight.data = torch.zeros(4, 8)
        twin.router.weight.data[kept[n]] = x[n]  # sends this token to the expert it was left with
        twin.router.scale = max(w for t, w in _pairs(record) if t == n)
        torch.testing.assert_close(twin(x[n : n + 1])[0], out[n])
    assert weight  # at least one token was compared
    assert one_left.any()


def _pairs(record):
    return list(zip(record.routing.token.tolist(), record.routing.weight.tolist(), strict=True))


def test_without_talk_a_row_depends_on_itself(double):
    """graph="self": the same maps, but what one expert says moves nobody else's row, nor the mediator."""
    x = torch.randn(5, 2, 8)
    for graph, moves in (("self", False), ("complete", True)):
        torch.manual_seed(1)
        conv = build(graph=graph).couplers[0]
        before, changed = conv(x), x.clone()
        changed[:, 1] += 1
        difference = (conv(changed) - before).abs()
        assert (difference[:, [0, 2]].max() > 1e-3) == moves and difference[:, 1].max() > 1e-3


def test_records_what_the_collaboration_did(double):
    layer, x = build(k=2), torch.randn(30, 8)
    _, record = layer(x, return_record=True)
    assert record.attention is None and record.gate.shape == (30,)
    torch.testing.assert_close(record.gate, torch.sigmoid(layer.fusion.gate(x)).squeeze(1))
    layer.track_attention = True
    kept, tracked = layer(x, return_record=True)
    torch.testing.assert_close(kept, layer(x))
    assert tracked.attention.shape == (2, 30, 2, 3, 3)
    torch.testing.assert_close(tracked.attention.sum(dim=-1), torch.ones(2, 30, 2, 3))
    assert layer.connections() is None
    layer.track_attention = False
    torch.testing.assert_close(kept, layer(x))


def test_knobs(double):
    layer, x = build(coupling_layers=2), torch.randn(5, 8)
    deeper = build(coupling_layers=3)
    deeper.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, rounds=3), deeper(x), rtol=0, atol=0)
    assert (layer(x, steps=1) - layer(x)).abs().max() > 1e-3
    for knob, options in (
        ("rounds", {"coupling_layers": 0, "mediator": False}),
        ("steps", {"reasoning_steps": 0}),
    ):
        with pytest.raises(ConfigError, match=r"adjust|reason in steps"):
            build(**options)(x, **{knob: 1})


def test_a_ghost_asleep_changes_nothing_and_a_waking_one_little(double):
    asleep = build(num_ghosts=2, awake=False)
    plain, x = build(), torch.randn(30, 8)
    state = asleep.state_dict()
    for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"):
        state[name] = state[name][:4]
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("ghosts.")})
    torch.testing.assert_close(asleep(x), plain(x), rtol=0, atol=1e-12)
    before = asleep(x)
    asleep.ghosts.phase[0], asleep.ghosts.steps[0] = 1, 1
    asleep.ghosts.rate = 1e-6
    assert (asleep(x) - before).abs().max() < 0.01 * before.abs().max()


def test_inside_a_gnn_of_ones_own():
    """An MoE GNN with collaborating experts, on a homogeneous graph and through ``to_hetero``."""

    class Net(torch.nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.first, self.moe, self.last = conv, build(), SAGEConv(8, 2)

        def forward(self, x, edge_index):
            return self.last(self.moe(self.first(x, edge_index)), edge_index)

    x, edges = torch.randn(10, 5), torch.randint(10, (2, 30))
    out = Net(GCNConv(5, 8))(x, edges)
    assert out.shape == (10, 2) and out.isfinite().all()
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(6, 5), torch.randn(7, 5)
    data["a", "to", "b"].edge_index = torch.stack([torch.randint(6, (20,)), torch.randint(7, (20,))])
    data["b", "to", "a"].edge_index = torch.stack([torch.randint(7, (20,)), torch.randint(6, (20,))])
    hetero = to_hetero(Net(SAGEConv((-1, -1), 8)), data.metadata())
    outs = hetero(data.x_dict, data.edge_index_dict)
    assert {k: v.shape for k, v in outs.items()} == {"a": (6, 2), "b": (7, 2)}


def test_under_autocast():
    layer, x = build(capacity_factor=1.0), torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_wrong_input():
    with pytest.raises(ConfigError, match="coupling_kwargs: CollabConv does not take this"):
        MoELayer(8, 4, 2, coupling="collab", coupling_kwargs={"strategy": "all"})
    with pytest.raises(ConfigError, match="fusion: nobody listens to the mediator"):
        build(fusion="sum")
    with pytest.raises(ConfigError, match="heads must divide"):
        MoELayer(8, 4, 2, coupling="collab", coupling_kwargs={"heads": 3})
    with pytest.raises(ConfigError, match="coupling_scale: collaboration has norms of its own"):
        build(coupling_scale=0.1)
