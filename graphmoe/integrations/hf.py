"""Hugging Face's mixture-of-experts models: their experts through our kernels, and dense models made sparse.

A model of transformers hands the weights of its experts, and of every token the ids and weights of those
it chose, to the function that ``experts_implementation`` names. :func:`register` adds one named ``graphmoe``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)
from transformers.utils import logging

from graphmoe.integrations.upcycling import upcycle
from graphmoe.ops import grouped_mlp

__all__ = ["NAME", "experts_forward", "register", "unsupported", "upcycle"]

NAME = "graphmoe"
"""Of the experts implementation."""

_logger = logging.get_logger(__name__)


def register() -> None:
    """Make ``experts_implementation="graphmoe"`` known to transformers, for all models of this process.

    Then it is chosen like those that transformers brings::

        from graphmoe.integrations import hf

        hf.register()
        model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="graphmoe")
        other_model.set_experts_implementation("graphmoe")

    Weights and checkpoints stay what they are, and the choice is not saved. Calling it again changes nothing.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    r"""The weighted sum over each token's experts, by :func:`~graphmoe.ops.grouped_mlp`.

    .. math::
        y_n = \sum_{s} w_{ns}\, W^{down}_e \bigl(\mathrm{SiLU}(W^{gate}_e x_n) \odot W^{up}_e x_n\bigr),
        \qquad e = \mathrm{index}_{ns}

    or with the exact GELU and no gate. The rows are sorted by expert once; gathering, activation, weights and
    sum happen inside one operator, which keeps nothing for the backward pass but its inputs and the hidden
    rows before the activation. An index of ``E`` or above is an absent row, as under expert parallelism: it
    gives 0 and receives 0.

    Experts that are anything else (see :func:`unsupported`) run through ``grouped_mm``, which is the default
    of transformers, or in float64, which that does not take, as ``eager``; a warning says so once.

    Args:
        experts: A module decorated by transformers' ``use_experts_implementation``.
        hidden_states: Tokens ``[N, D]``.
        top_k_index: Experts of each token, ``[N, k]`` int64.
        top_k_weights: Their weights, ``[N, k]``.

    Returns:
        ``[N, D]``, of the type of ``hidden_states``.
    """
    reason = unsupported(experts)
    if reason:
        return _fall_back(reason, experts, hidden_states, top_k_index, top_k_weights)
    first, second = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    if experts.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    slots = top_k_index.size(1)
    ordered, perm = top_k_index.flatten().sort(stable=True)
    ids = torch.arange(second.size(0) + 1, device=ordered.device)
    out = grouped_mlp(
        hidden_states.to(first.dtype),
        first,
        second,
        torch.searchsorted(ordered, ids),
        token=perm.div(slots, rounding_mode="floor"),
        weight=top_k_weights.flatten().index_select(0, perm),
        perm=perm,
        reduce=True,
        activation="swiglu" if experts.has_gate else "gelu",
    )
    return out.to(hidden_states.dtype)


def unsupported(experts: nn.Module) -> str:
    """Why our kernels cannot run a module of experts; empty if they can."""
    if experts.has_bias:
        return "its projections have biases"
    if not getattr(experts, "is_concatenated", True):
        return "its gates and values are interleaved"
    if getattr(experts, "has_post_expert_norm", False):
        return "it has a norm behind every expert"
    if experts.has_gate:
        if type(experts)._apply_gate is not _default_apply_gate:
            return "it has a gate of its own"
        return "" if _is_silu(experts.act_fn) else f"its activation is {_name(experts.act_fn)}, not SiLU"
    return "" if _is_gelu(experts.act_fn) else f"its activation is {_name(experts.act_fn)} without a gate"


def _is_silu(act_fn: object) -> bool:
    return act_fn is F.silu or isinstance(act_fn, nn.SiLU | SiLUActivation)


def _is_gelu(act_fn: object) -> bool:
    exact = isinstance(act_fn, nn.GELU) and act_fn.approximate == "none"
    return exact or act_fn is F.gelu or isinstance(act_fn, GELUActivation)


def _name(act_fn: object) -> str:
    return getattr(act_fn, "__name__", type(act_fn).__name__)


def _fall_back(
    reason: str, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    slow = hidden_states.dtype == torch.float64
    if not torch.compiler.is_compiling():
        name = "eager" if slow else "grouped_mm"
        _logger.warning_once(
            f"experts_implementation={NAME!r} does not support {type(experts).__name__}: {reason}. "
            f"It runs as {name!r} instead."
        )
    if slow:
        # What the class defined before the decorator of transformers wrapped it.
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
