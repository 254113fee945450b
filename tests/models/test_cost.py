import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM
from graphmoe.models.cost import forward_flops
from graphmoe.nn import MoELayer, edge_form

TOKENS = 12


def build(**options):
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 3}
    return GraphMoEForCausalLM(GraphMoEConfig(**(sizes | options))).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"coupling": "none"},
        {"coupling": "hyper"},
        {"coupling": "hyper", "num_ghosts": 2, "fusion_projection": True},
        {"coupling": "gnn", "coupling_layers": 1},
        {"coupling": "gnn", "hidden_act": "gelu", "num_experts_per_tok": 4},
        {"coupling": "collab", "fusion": "gated", "collab_heads": 2, "reasoning_steps": 3},
        {"coupling": "collab", "collab_mediator": False, "collab_heads": 2, "collab_hidden_size": 40},
        {"coupling": "collab", "coupling_layers": 0, "fusion": "gated", "reasoning_steps": 1},
        {"router": "contextual", "collab_heads": 2, "num_experts_per_tok": 2},
    ],
    ids=str,
)
def test_counts_what_torch_counts(options):
    """torch sees the matrix products of the edge form; attention and mixing are messages there."""
    model = build(**options)
    k = min(model.config.num_experts_per_tok, model.config.num_experts)
    with edge_form(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(61, (1, TOKENS)), use_cache=False)
    attention = 2 * 2 * (TOKENS + 1) * 16
    rounds = sum(len(layer.couplers) for layer in model.moe_layers())
    mixing = rounds * 2 * k * k * 16
    if model.config.coupling == "collab":
        nodes = k + model.config.collab_mediator
        mixing = rounds * 2 * 4 * nodes * nodes * 16  # two rounds; scores and sums
    if model.config.router == "contextual":
        mixing += len(model.moe_layers()) * 4 * 4 * 4 * 16
    # The two halves of a gnn gate are a narrow product that the count leaves out.
    gates = 2 * k * 2 * 16 * rounds if model.config.coupling == "gnn" else 0
    # Mean outputs of the experts are kept for the records, not for the output.
    tracked = sum(2 * (m.num_experts + m.num_ghosts) * k * 16 for m in model.moe_layers() if m.track_outputs)
    seen = counter.get_total_flops() // TOKENS - gates - tracked
    assert forward_flops(model, TOKENS) == seen + attention + mixing


def test_coupling_costs_arithmetic_that_its_parameters_do_not_show():
    plain, coupled = build(), build(coupling="hyper")
    extra = coupled.num_active_parameters() - plain.num_active_parameters()
    assert forward_flops(coupled, 8) - forward_flops(plain, 8) > 2 * extra


@pytest.mark.parametrize("router", ["topk", "contextual"])
def test_a_hidden_layer_of_the_router_is_passed_once(router):
    plain = forward_flops(MoELayer(16, 4, 2, router=router), 8)
    hidden = forward_flops(MoELayer(16, 4, 2, router=router, router_hidden_channels=5), 8)
    assert hidden - plain == 2 * (16 * 5 + 5 * 4 - 16 * 4)
