import pytest
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip

from graphmoe.errors import ConfigError
from graphmoe.nn import GatedFusion, edge_form


def build(mediator=True):
    fusion = GatedFusion(5, mediator=mediator)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    return fusion


@pytest.mark.parametrize("mediated", [True, False])
def test_edge_form_equals_fast_form_and_the_formula(mediated, double):
    fusion = build(mediated)
    x, weight = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 3)
    token, mediator = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    extra = {"token": token, "mediator": mediator} if mediated else {}

    def edge():
        with edge_form(fusion):
            return fusion(x, edge_weight=weight, **extra)

    def formula():
        out = []
        for n in range(4):
            total = sum(weight[n, r] * x[n, r] for r in range(3))
            if mediated:
                gate = 1 / (1 + torch.exp(-(fusion.gate.weight[0] @ token[n] + fusion.gate.bias[0])))
                total = gate * mediator[n] + (1 - gate) * total
            out.append(fusion.lin.weight @ total)
        return torch.stack(out)

    inputs = [x, token, mediator]
    assert_same(fusion, inputs, lambda: fusion(x, edge_weight=weight, **extra), edge)
    assert_same(fusion, inputs, lambda: fusion(x, edge_weight=weight, **extra), formula, tol=1e-10)


def test_a_token_without_rows_gets_nothing_from_its_mediator_either(double):
    fusion, weight = build(), torch.tensor([[0.3, 0.7], [0.0, 0.0]])
    x, extra = torch.randn(2, 2, 5), {"token": torch.randn(2, 5), "mediator": torch.randn(2, 5)}
    out, gate = fusion(x, edge_weight=weight, **extra, return_gate=True)
    assert out[0].abs().min() > 0 and (out[1] == 0).all()
    assert gate.shape == (2,) and ((gate > 0) & (gate < 1)).all()


def test_on_any_edges(double):
    fusion, x = build(), torch.randn(4, 5)
    extra = {"token": torch.randn(3, 5), "mediator": torch.randn(3, 5)}
    edges, weight = torch.tensor([[2, 0, 3, 1], [0, 2, 2, 0]]), torch.rand(4)
    out = fusion(x, edges, weight, num_tokens=3, **extra)
    served = {name: value[[0, 2]] for name, value in extra.items()}
    rows, of_row = x[torch.tensor([[2, 1], [0, 3]])], weight[torch.tensor([[0, 3], [1, 2]])]
    torch.testing.assert_close(out[[0, 2]], fusion(rows, edge_weight=of_row, **served))
    assert (out[1] == 0).all()


def test_contract():
    fusion, x, weight = build(), torch.randn(4, 3, 5), torch.rand(4, 3)
    extra = {"token": torch.randn(4, 5), "mediator": torch.randn(4, 5)}
    assert_state_round_trip(fusion, build(), lambda f: f(x, edge_weight=weight, **extra))
    assert_every_parameter_learns(fusion, fusion(x, edge_weight=weight, **extra).pow(3).sum())
    assert repr(fusion) == "GatedFusion(5, mediator=True)"
    with pytest.raises(ConfigError, match="mediator does not fit the fusion"):
        fusion(x, edge_weight=weight)
    with pytest.raises(ConfigError, match="mediator does not fit the fusion; expected none"):
        build(mediator=False)(x, edge_weight=weight, **extra)
