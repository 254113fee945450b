"""Slow, obvious oracles, written as the formulas stand."""

import torch
from torch import Tensor
from torch.nn import functional as F


def expert(x: Tensor, gate_up: Tensor, down: Tensor, activation: str = "swiglu") -> Tensor:
    hidden = gate_up @ x
    if activation == "swiglu":
        gate, up = hidden.chunk(2)
        return down @ (F.silu(gate) * up)
    return down @ F.gelu(hidden)


def moe(layer, x: Tensor) -> Tensor:
    """Top-k mixture without coupling, one token and one slot at a time."""
    rows = []
    for token in x:
        logits = layer.router.weight @ token
        order = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[: layer.k]
        weights = logits[order].softmax(0)
        served = [expert(token, layer.experts.gate_up_proj[e], layer.experts.down_proj[e]) for e in order]
        rows.append(sum(w * o for w, o in zip(weights, served, strict=True)))
    return torch.stack(rows)


def gnn_couple(conv, x: Tensor, ids: list[int]) -> Tensor:
    """One round of CoupleConv on one token ``x [nodes, F]`` whose rows carry expert ``ids``."""
    target, source = conv.gate
    out = []
    for i in range(len(x)):
        heard = torch.zeros_like(x[i])
        for j in range(len(x)):
            if i != j:
                gate = torch.sigmoid(target @ x[i] + source @ x[j] + conv.gate_bias[0])
                heard = heard + torch.sigmoid(conv.adjacency[ids[i], ids[j]]) * gate * x[j]
        out.append(x[i] + F.gelu(conv.lin_neighbor.weight @ heard + conv.lin_self.weight @ x[i]))
    return torch.stack(out)


def hyper_couple(x: Tensor, theta: Tensor, edges: list[tuple[int, ...]], weight: Tensor) -> Tensor:
    """``D^-1 B W C^-1 B^T X Theta`` on one token, with dense matrices."""
    incidence = torch.zeros(len(x), len(edges), dtype=x.dtype)
    for h, members in enumerate(edges):
        incidence[list(members), h] = 1
    degree = (incidence * weight).sum(1)
    size = incidence.sum(0)
    inverse = torch.where(degree > 0, 1 / degree.clamp(min=1e-300), torch.zeros_like(degree))
    return (
        torch.diag(inverse)
        @ incidence
        @ torch.diag(weight)
        @ torch.diag(1 / size)
        @ incidence.T
        @ x
        @ theta.T
    )
