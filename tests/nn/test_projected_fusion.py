import pytest
import torch
from contract import assert_every_parameter_learns, assert_same, assert_state_round_trip
from torch.nn import functional as F

from graphmoe.nn import ProjectedFusion, edge_form


def build():
    fusion = ProjectedFusion(5)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    return fusion


def test_edge_form_equals_fast_form_and_the_formula(double):
    fusion = build()
    x, weight = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 3)

    def edge():
        with edge_form(fusion):
            return fusion(x, edge_weight=weight)

    def formula():
        total = torch.einsum("nk,nkf->nf", weight, x)
        hidden = F.gelu(total @ fusion.lin.weight.t() + fusion.lin.bias)
        centred = hidden - hidden.mean(dim=1, keepdim=True)
        scale = (hidden.var(dim=1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        return centred * scale * fusion.norm.weight + fusion.norm.bias

    assert_same(fusion, [x], lambda: fusion(x, edge_weight=weight), edge)
    assert_same(fusion, [x], lambda: fusion(x, edge_weight=weight), formula, tol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_a_token_without_rows_gets_nothing(fused, double):
    fusion = build()
    fusion.sum.fuse = fused
    weight = torch.tensor([[0.3, 0.7], [0.0, 0.0]])
    out = fusion(torch.randn(2, 2, 5), edge_weight=weight)
    assert out[0].abs().min() > 0 and (out[1] == 0).all()


def test_on_any_edges(double):
    """Rows in another order, one token without any."""
    fusion, x = build(), torch.randn(4, 5)
    edges, weight = torch.tensor([[2, 0, 3, 1], [0, 2, 2, 0]]), torch.rand(4)
    out = fusion(x, edges, weight, num_tokens=3)
    dense = fusion(x[torch.tensor([[2, 1], [0, 3]])], edge_weight=weight[torch.tensor([[0, 3], [1, 2]])])
    torch.testing.assert_close(out[[0, 2]], dense)
    assert (out[1] == 0).all()


def test_contract():
    fusion = build()
    x, weight = torch.randn(4, 3, 5), torch.rand(4, 3)
    assert_state_round_trip(fusion, ProjectedFusion(5), lambda f: f(x, edge_weight=weight))
    assert_every_parameter_learns(fusion, fusion(x, edge_weight=weight).pow(3).sum())
    assert fusion(x[:0], edge_weight=weight[:0]).shape == (0, 5)
