"""What the experts of a token do together on held-out text: who meets, who listens, what talk is worth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.metrics import random_coactivation, serving
from graphmoe.nn import IterativeExpert, MoELayer, moe_layers
from graphmoe.nn.rows import attention_of_experts
from graphmoe.train.evaluate import evaluating, pick_inputs, pick_windows, window_losses
from graphmoe.typing import Record

BATCH_TOKENS = 1024
"""Tokens whose attention is held at once: that of many experts is large."""


@torch.no_grad()
def probe_collaboration(
    model: nn.Module, windows: np.ndarray, *, max_tokens: int = 2048
) -> dict[str, Tensor]:
    r"""Measure which experts meet at a token and, where they collaborate, who listens to whom.

    Nothing in the model changes. ``n`` nodes are the ``E`` experts and, behind them, the mediator if there
    is one. Figures end in ``_random`` or ``_uniform`` where they are what chance gives:

    - ``final_coactivation [L, E, E]``: share of the tokens that both experts serve; see
      :func:`~graphmoe.metrics.coactivation`. ``final_coactivation_random [L, E, E]``: of experts with the
      same loads that are chosen independently of one another; see
      :func:`~graphmoe.metrics.random_coactivation`.
    - ``final_attention [L, n, n]`` (listening, speaking): attention of one node to another, mean over the
      tokens that have both, over rounds and heads; NaN for two that never meet.
      ``final_attention_uniform [L]``: of a node that listens to all nodes of its token alike, itself
      included, ``mean 1 / nodes``.
    - ``final_mediator_gate [L]``, ``final_mediator_gate_std [L]``: share of the mediator in what returns to
      a token, mean and standard deviation over tokens.

    Args:
        model: A language model of this library.
        windows: Token ids ``[n, T + 1]``, of which every token but the last of a window is read.
        max_tokens: Tokens measured: as many windows, evenly spread over those given, as fit (at least one,
            cut short if need be).

    Returns:
        Those of the figures above that the model has, on the CPU in float32; none without MoE layers.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    ids = pick_inputs(windows, max_tokens).to(next(model.parameters()).device)
    sums: list[dict[str, Tensor]] = [{} for _ in layers]
    with evaluating(model), attention_kept(layers):
        for part in ids.split(max(1, BATCH_TOKENS // ids.size(1))):
            records = model(input_ids=part, output_records=True, use_cache=False, logits_to_keep=1).records
            for total, record in zip(sums, records, strict=True):
                for name, value in _sums(record).items():
                    total[name] = total.get(name, 0) + value
    rows = [_figures(total) for total in sums]
    return {f"final_{name}": torch.stack([row[name] for row in rows]).float() for name in rows[0]}


def probe_inference(
    model: nn.Module,
    windows: np.ndarray,
    *,
    rounds: Sequence[int] = (0, 1, 2, 4),
    steps: Sequence[int] = (1, 2, 4),
    max_tokens: int = 8192,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Score a model with more or fewer rounds of collaboration and steps of reasoning than in training.

    The numbers it was trained with are always among those that are tried. A knob that the model does not have
    stays at 0: rounds unless its experts collaborate, steps unless they are iterative.

    - ``final_inference_loss [steps, rounds]``: mean cross-entropy of held-out tokens, nats.
    - ``final_inference_error [steps, rounds]``: standard error, over windows, of its difference to the loss
      with the numbers of training.
    - ``final_inference_rounds``, ``final_inference_steps``: what was tried, ascending, int64.
    - ``final_inference_trained [2]``: steps and rounds of training, int64.

    Args:
        model: A language model of this library; nothing in it changes.
        windows: Token ids ``[n, T + 1]``; every token but the first of a window is predicted.
        rounds: Rounds of collaboration to try, 0 for no talk.
        steps: Steps of reasoning to try, from 1 on.
        max_tokens: Tokens scored: as many windows, evenly spread over those given, as fit (at least one).
        batch_size: Windows scored at once.

    Returns:
        The figures above on the CPU; none for a model with neither knob.

    Raises:
        DataError: No window.
        ConfigError: ``max_tokens`` below 1, negative rounds, or steps below 1.
    """
    if min(rounds, default=0) < 0 or min(steps, default=1) < 1:
        what = "not so many rounds or steps"
        raise ConfigError(what, "rounds, steps", "rounds >= 0, steps >= 1", [list(rounds), list(steps)])
    trained = _trained_knobs(model)
    if not trained:
        return {}
    now = {knob: trained.get(knob, 0) for knob in ("reasoning_steps", "collab_rounds")}
    tried = {
        knob: sorted({*values, now[knob]}) if knob in trained else [0]
        for knob, values in zip(now, (steps, rounds), strict=True)
    }
    chosen = pick_windows(windows, max_tokens)
    settings = [dict(zip(now, pair, strict=True)) for pair in product(*tried.values())]
    sums = [
        window_losses(model, chosen, batch_size=batch_size, **{knob: pair[knob] for knob in trained})
        for pair in settings
    ]
    losses = torch.stack(sums) / (chosen.shape[1] - 1)  # [settings, windows]
    change, count = losses - losses[settings.index(now)], losses.size(1)
    error = change.std(dim=1) / count**0.5 if count > 1 else torch.full_like(change[:, 0], torch.nan)
    shape = [len(values) for values in tried.values()]
    return {
        "final_inference_loss": losses.mean(dim=1).float().view(shape),
        "final_inference_error": error.float().view(shape),
        "final_inference_steps": torch.tensor(tried["reasoning_steps"]),
        "final_inference_rounds": torch.tensor(tried["collab_rounds"]),
        "final_inference_trained": torch.tensor(list(now.values())),
    }


def gate_sums(record: Record) -> Tensor:
    """Number of tokens with experts, the sum of the gates of their mediators and that of their squares,
    ``[3]`` float64: what can be added up over batches and ranks."""
    served = serving(record.routing).any(dim=1)
    gate = torch.where(served, record.gate.detach().double(), 0)
    return torch.stack([served.sum().double(), gate.sum(), gate.square().sum()])


def gate_spread(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over tokens, ``[*]``, from the sums ``[*, 3]`` of :func:`gate_sums`."""
    count, total, square = sums.unbind(dim=-1)
    mean = total / count.clamp(min=1)
    return mean, (square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()


@contextmanager
def attention_kept(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Let layers put the attention of collaborating experts into their records, as long as this lasts."""
    before = [layer.track_attention for layer in layers]
    for layer in layers:
        layer.track_attention = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.track_attention = value


def _trained_knobs(model: nn.Module) -> dict[str, int]:
    """Arguments of the model's forward that can be moved, with the numbers of training."""
    knobs = {}
    for layer in moe_layers(model)[:1]:
        if isinstance(layer.experts, IterativeExpert):
            knobs["reasoning_steps"] = layer.experts.steps
        if layer.coupling == "collab" and layer.couplers:
            knobs["collab_rounds"] = layer.couplers[0].rounds
    return knobs


def _sums(record: Record) -> dict[str, Tensor]:
    """What of one batch adds up to the figures of a layer."""
    serves = serving(record.routing).double()
    degree = serves.sum(dim=1)
    sums = {"tokens": (degree > 0).sum(), "together": serves.t() @ serves}
    sums |= {"edges": degree.sum(), "squares": degree.square().sum()}
    if record.attention is not None and record.attention.size(0):
        heard, met, uniform = attention_of_experts(record)
        sums |= {"heard": heard, "met": met, "uniform": uniform.sum()}
    if record.gate is not None:
        sums["gate"] = gate_sums(record)
    return {name: value.cpu() for name, value in sums.items()}


def _figures(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The figures of one layer."""
    together = sums["together"] / sums["tokens"].clamp(min=1)
    # Numbers are equal exactly where their mean square is the square of their mean.
    equal = bool(sums["squares"] * sums["tokens"] == sums["edges"] ** 2)
    random = random_coactivation(together.diagonal(), fixed=equal)
    figures = {"coactivation": together, "coactivation_random": random}
    if "heard" in sums:
        figures["attention"] = sums["heard"] / sums["met"]  # 0 / 0 is NaN: never together
        figures["attention_uniform"] = sums["uniform"] / sums["tokens"].clamp(min=1)
    if "gate" in sums:
        figures["mediator_gate"], figures["mediator_gate_std"] = gate_spread(sums["gate"])
    return figures
