"""Auxiliary losses of routed models: one implementation for every head."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graphmoe import loss as losses
from graphmoe.models.blocks import build_orthogonality
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.cost import active_parameters
from graphmoe.models.outputs import GraphMoEModelOutput
from graphmoe.nn import MoELayer, moe_layers
from graphmoe.typing import MemoryRecord, Record

_COEFFICIENTS = {
    "balance": "router_aux_loss_coef",
    "router_z": "router_z_loss_coef",
    "memory_balance": "memory_aux_loss_coef",
}
"""Losses whose coefficient is not called after them."""


class AuxLosses(nn.Module):
    """What models with a head share: the losses of their experts and memories, beside that of their task.

    In processes that train together the balancing losses count the edges of all of them, so a forward pass in
    training mode with ``labels`` and gradients is a collective: every process has to run it.

    The strength of the orthogonality losses is a buffer, one value a layer, which a training
    callback may move; it starts at 1 and multiplies both coefficients. With
    ``orthogonality_adaptive`` the callback follows the state of ``orthogonality``, an
    :class:`~graphmoe.nn.OrthogonalityStrength`: the buffer is its strength over its base, the
    coefficient of outputs or, if that is 0, of weights.
    """

    config: GraphMoEConfig

    def build_aux_losses(self) -> None:
        """Make the state of the losses; called once, in ``__init__``."""
        self.register_buffer("orthogonality_strength", torch.ones(self.config.num_hidden_layers))
        adaptive = self.config.orthogonality_adaptive
        self.orthogonality = build_orthogonality(self.config) if adaptive else None

    def with_aux_losses(self, task: Tensor, aux: Mapping[str, Tensor]) -> Tensor:
        """The loss of the task plus every auxiliary loss times its coefficient, scalar."""
        for name, value in aux.items():
            task = task + getattr(self.config, _COEFFICIENTS.get(name, f"{name}_coef")) * value
        return task

    def aux_losses(self, outputs: GraphMoEModelOutput, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """Unscaled auxiliary losses with a non-zero coefficient, averaged over layers.

        Args:
            outputs: What left the last block, ``[B, T, D]``, and what the layers did, in order.
            attention_mask: ``[B, S]``, 0 for padding, of which the last ``T`` count.
        """
        mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -outputs.last_hidden_state.size(1) :].bool()
        terms = self._of_experts(outputs.records, mask) if outputs.records else {}
        if self.config.memory_aux_loss_coef and outputs.memory_records:
            terms["memory_balance"] = self._balance(outputs.memory_records, mask)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _of_experts(self, records: tuple[Record, ...], mask: Tensor | None) -> dict[str, list[Tensor]]:
        terms: dict[str, list[Tensor]] = {}
        if self.config.router_aux_loss_coef:
            terms["balance"] = self._balance(records, mask)
        for layer, record, strength in zip(
            self.moe_layers(), records, self.orthogonality_strength, strict=True
        ):
            routing = record.routing
            live = torch.ones(routing.num_experts, dtype=torch.bool, device=routing.logits.device)
            if layer.ghosts is not None:
                live = layer.ghosts() > 0
            if self.config.router_z_loss_coef:
                terms.setdefault("router_z", []).append(losses.router_z(routing, mask))
            if self.config.drop_penalty_coef and record.overflow is not None:
                value = losses.drop_penalty(routing, record.overflow)
                terms.setdefault("drop_penalty", []).append(value)
            if self.config.diversity_coef:
                terms.setdefault("diversity", []).append(losses.diversity(record.attention))
            if self.config.orthogonality_output_coef and record.expert_mean is not None:
                value = strength * losses.orthogonality(record.expert_mean, live)
                terms.setdefault("orthogonality_output", []).append(value)
            if self.config.orthogonality_weight_coef:
                value = strength * losses.orthogonality(layer.experts.gate_up_proj, live)
                terms.setdefault("orthogonality_weight", []).append(value)
        return terms

    def _balance(self, records: Sequence[Record | MemoryRecord], mask: Tensor | None) -> list[Tensor]:
        """The balancing loss of each router, by the edges of all processes while they train."""
        counts = [losses.wanted(record) for record in records]
        if self.training and torch.is_grad_enabled():
            counts = losses.over_ranks(torch.stack(counts)).unbind()
        return [
            losses.balance(record.routing, mask, count) for record, count in zip(records, counts, strict=True)
        ]

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in order; their number is that of the records."""
        return moe_layers(self)

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through; see :func:`~graphmoe.models.cost.active_parameters`."""
        return active_parameters(self)
