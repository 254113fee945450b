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


def hyper_attention(
    x: Tensor, theta: Tensor, edges: list[tuple[int, ...]], weight: Tensor, gather: Tensor, spread: Tensor
) -> Tensor:
    """Attention on the incidences of one token, one hyperedge and one node at a time."""
    z = x @ theta.T
    centre = [torch.stack([z[i] for i in members]).mean(dim=0) for members in edges]
    heard = []
    for members, e in zip(edges, centre, strict=True):
        score = torch.stack([F.leaky_relu(gather[0] @ z[i] + gather[1] @ e, 0.2) for i in members])
        share = score.exp() / score.exp().sum()
        heard.append(sum(a * z[i] for a, i in zip(share, members, strict=True)))
    out = []
    for i in range(len(x)):
        around = [h for h, members in enumerate(edges) if i in members]
        share = {
            h: weight[h] * F.leaky_relu(spread[0] @ z[i] + spread[1] @ centre[h], 0.2).exp() for h in around
        }
        row = torch.zeros_like(z[i])
        for h in around:
            row = row + share[h] / sum(share.values()) * heard[h]
        out.append(row)
    return torch.stack(out)


def row_attention(qkv: Tensor, heads: int, weight: Tensor) -> Tensor:
    """Attention on one token ``qkv [nodes, 3 * F]``, one head, one target and one source at a time."""
    query, key, value = (t.view(len(qkv), heads, -1) for t in qkv.chunk(3, dim=1))
    out = 0 * value
    for h in range(heads):
        for i in range(len(qkv)):
            sources = [j for j in range(len(qkv)) if weight[i, j] > 0]
            score = {j: query[i, h] @ key[j, h] / key.size(2) ** 0.5 for j in sources}
            total = sum(weight[i, j] * score[j].exp() for j in sources)
            for j in sources:
                out[i, h] = out[i, h] + weight[i, j] * score[j].exp() / total * value[j, h]
    return out.flatten(1)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean() + eps)


def collaborate(conv, x: Tensor, weight: Tensor, rounds: int) -> Tensor:
    """CollabConv on the nodes of one token, ``x [nodes, F]``, the mediator among them."""
    for _ in range(rounds):
        heard = row_attention(x @ conv.attention.lin_qkv.weight.T, conv.attention.heads, weight)
        out = []
        for row, said in zip(x, heard, strict=True):
            row = rms_norm(row + conv.attention.lin_out.weight @ said, conv.attention_norm.weight, 1e-6)
            fed = rms_norm(row, conv.feed_forward_norm.weight, 1e-6)
            out.append(row + expert(fed, conv.gate_up_proj.weight, conv.down_proj.weight))
        x = torch.stack(out)
    return x
