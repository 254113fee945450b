"""Scoring a language model on windows of token ids, and taking its experts apart."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError, DataError
from graphmoe.loss import load
from graphmoe.metrics import (
    linear_cka,
    load_entropy,
    max_violation,
    mutual_information,
    random_cka,
    random_specialisation,
    routing_entropy,
    shuffled_mutual_information,
    specialisation,
)
from graphmoe.nn import MoELayer, moe_layers
from graphmoe.nn.rows import outputs_of_all
from graphmoe.typing import Record

TOKEN_CLASSES = 256


def mean_loss(model: nn.Module, windows: np.ndarray, *, batch_size: int = 32) -> float:
    """Mean cross-entropy of the next token in nats, without auxiliary losses.

    Args:
        model: Takes ``input_ids`` and returns ``logits``; put in eval mode while it is scored.
        windows: Token ids ``[n, T + 1]``; every token but the first of a window is predicted.
        batch_size: Windows scored at once.
    """
    return window_losses(model, windows, batch_size=batch_size).sum().item() / windows[:, 1:].size


@torch.no_grad()
def window_losses(model: nn.Module, windows: np.ndarray, *, batch_size: int = 32, **options) -> Tensor:
    """Cross-entropy of each window, nats summed over its predicted tokens, ``[n]`` float64 on the CPU.

    Arguments as :func:`mean_loss`; ``options`` are further arguments of the model's forward.
    """
    device, sums = next(model.parameters()).device, [torch.zeros(0, dtype=torch.float64)]
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            ids = torch.from_numpy(windows[start : start + batch_size]).to(device)
            logits = model(input_ids=ids[:, :-1], use_cache=False, **options).logits
            # Summed in float64: thousands of batches of fp32 sums would lose digits.
            nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            sums.append(nats.double().view(len(ids), -1).sum(dim=1).cpu())
    return torch.cat(sums)


@torch.no_grad()
def probe_experts(model: nn.Module, windows: np.ndarray, *, max_tokens: int = 2048) -> dict[str, Tensor]:
    """Compare the experts of every layer on the same held-out tokens, each figure beside chance.

    Every live expert is applied to every token, whether the router would send it there or not. Nothing
    in the model changes. Figures end in ``_random`` where they are what chance gives:

    - ``final_cka [L, E, E]``: see :func:`~graphmoe.metrics.linear_cka`; NaN beside a dormant ghost.
      ``final_cka_random [L]``: of Gaussian outputs.
    - ``final_specialisation [L]``: see :func:`~graphmoe.metrics.specialisation`, of mean outputs over
      the tokens each expert serves; experts that serve none do not count.
      ``final_specialisation_random [L]``: of as many Gaussian vectors.
    - ``final_routing_entropy [L]``, bits. ``final_routing_entropy_random [L]``: of a router that does
      not decide, the log of the number of live experts.
    - ``final_mutual_information [L]``, bits between expert and class of the token, which is its id
      where it is one of the 255 most frequent ones, and one class for the rest.
      ``final_mutual_information_random [L]``: the same edges with experts shuffled.
    - ``final_load [L, E]``: share of the edges.

    Args:
        model: A language model of this library.
        windows: Token ids ``[n, T + 1]``, of which every token but the last of a window is read.
        max_tokens: Tokens compared: as many windows, evenly spread over those given, as fit (at least one,
            cut short if need be).

    Returns:
        The figures above on the CPU in float32; none for a model without MoE layers.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    ids = pick_inputs(windows, max_tokens).to(next(model.parameters()).device)
    inputs: list[Tensor] = []
    with evaluating(model), _inputs_kept(layers, inputs):
        records = model(input_ids=ids, output_records=True, use_cache=False, logits_to_keep=1).records
    classes = _token_classes(ids.flatten().cpu())
    rows = [
        _probe_layer(layer, x, record, classes)
        for layer, x, record in zip(layers, inputs, records, strict=True)
    ]
    return {f"final_{name}": torch.stack([row[name] for row in rows]).float() for name in rows[0]}


def expert_summary(probe: dict[str, Tensor]) -> dict[str, list[float]]:
    """The figures of :func:`probe_experts` as one number a layer, for JSON.

    CKA is the mean over pairs of live experts (0 without a pair). Added are ``max_violation`` and
    ``load_entropy`` of the load among live experts, and where they are known the ``mediator_gate``, the
    ``batch_violation`` and the ``batch_violation_even``.

    Args:
        probe: What :func:`probe_experts` returned, and maybe
            :func:`~graphmoe.train.collaboration.probe_collaboration` and
            :func:`~graphmoe.train.routing.probe_balance`.

    Returns:
        One list of ``L`` floats a figure; empty for an empty probe.
    """
    if not probe:
        return {}
    names = ("specialisation", "cka", "routing_entropy", "mutual_information")
    figures = {name: probe[f"final_{name}"] for base in names for name in (base, f"{base}_random")}
    live = ~figures["cka"].diagonal(dim1=1, dim2=2).isnan()  # [L, E]
    pair = live.unsqueeze(1) & live.unsqueeze(2) & ~torch.eye(live.size(1), dtype=torch.bool)
    total = torch.where(pair, figures["cka"], 0).sum(dim=(1, 2))
    figures["cka"] = total / pair.sum(dim=(1, 2)).clamp(min=1)
    for name, measure in (("max_violation", max_violation), ("load_entropy", load_entropy)):
        values = [measure(row, alive) for row, alive in zip(probe["final_load"], live, strict=True)]
        figures[name] = torch.stack(values)
    for name in ("mediator_gate", "batch_violation", "batch_violation_even"):
        if f"final_{name}" in probe:
            figures[name] = probe[f"final_{name}"]
    return {name: values.tolist() for name, values in figures.items()}


def pick_windows(windows: np.ndarray, max_tokens: int) -> np.ndarray:
    """Windows ``[B, T + 1]`` evenly spread over those given: as many as ``max_tokens`` inputs fill, at least
    one.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1.
    """
    if max_tokens < 1:
        raise ConfigError("nothing to measure on", "max_tokens", "at least 1", max_tokens)
    if not windows[:, :-1].size:
        raise DataError("nothing to measure on", "windows", "[n, T + 1] token ids", windows.shape)
    count = min(len(windows), max(1, max_tokens // (windows.shape[1] - 1)))
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


def pick_inputs(windows: np.ndarray, max_tokens: int) -> Tensor:
    """Inputs ``[B, T]`` of :func:`pick_windows`, at most ``max_tokens`` tokens."""
    return torch.from_numpy(pick_windows(windows, max_tokens)[:, :-1][:, :max_tokens])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _inputs_kept(layers: list[MoELayer], kept: list[Tensor]) -> Iterator[None]:
    """Keep the tokens ``[N, D]`` that enter each layer."""

    def keep(layer: MoELayer, arguments: tuple, options: dict) -> None:
        x = arguments[0] if arguments else options["x"]
        kept.append(x.detach().flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _token_classes(ids: Tensor) -> Tensor:
    """Class of each token ``[N]``: its id if frequent, else one class for all the others."""
    known, index, counts = ids.unique(return_inverse=True, return_counts=True)
    ranks = torch.empty_like(known)
    ranks[counts.argsort(descending=True, stable=True)] = torch.arange(len(known))
    return ranks[index].clamp(max=TOKEN_CLASSES - 1)


def _probe_layer(layer: MoELayer, x: Tensor, record: Record, classes: Tensor) -> dict[str, Tensor]:
    routing = record.routing
    count = routing.num_experts
    live = torch.ones(count, dtype=torch.bool) if layer.ghosts is None else (layer.ghosts() > 0).cpu()
    alive = live.nonzero().flatten()
    outputs = outputs_of_all(layer.experts, x).transpose(0, 1).cpu()[alive]  # [live, N, D]
    cka = torch.full((count, count), float("nan"), dtype=torch.float64)
    cka[alive.unsqueeze(1), alive] = linear_cka(outputs)

    expert, edge_class = routing.expert.cpu(), classes[routing.token.cpu()]
    serves = torch.zeros(count + 1, x.size(0))
    serves[expert, routing.token.cpu()] = 1.0
    serves = serves[alive]  # [live, N]
    rows = serves.sum(dim=1)
    means = torch.einsum("en,end->ed", serves.to(outputs), outputs) / rows.clamp(min=1).unsqueeze(1)
    served = int((rows > 0).sum())
    return {
        "cka": cka,
        "cka_random": torch.tensor(random_cka(*outputs.shape[1:])),
        "specialisation": specialisation(means, rows > 0),
        "specialisation_random": torch.tensor(random_specialisation(served, x.size(1))),
        "routing_entropy": routing_entropy(routing).cpu(),
        "routing_entropy_random": torch.tensor(math.log2(len(alive))),
        "mutual_information": mutual_information(expert, edge_class, count, TOKEN_CLASSES),
        "mutual_information_random": shuffled_mutual_information(expert, edge_class, count, TOKEN_CLASSES),
        "load": load(routing).cpu(),
    }
