"""What networks of slots and experts share as transformers models: initial weights and losses of routers."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from graphmoe import loss as losses
from graphmoe.models.cost import active_parameters
from graphmoe.models.moca_configuration import MocaConfig
from graphmoe.models.moca_outputs import Present
from graphmoe.nn import ExpertConv, MemoryBank, MemoryLayer, MocaLayer
from graphmoe.nn.route import Router
from graphmoe.typing import MocaRecord


class MocaPreTrainedModel(PreTrainedModel):
    config: MocaConfig
    base_model_prefix = "model"
    _no_split_modules = ("MocaLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=module.weight.size(1) ** -0.5)
        elif isinstance(module, MemoryBank):
            init.normal_(module.slots, std=0.02)
        elif isinstance(module, ExpertConv):
            for weight in (module.gate_up_proj, module.down_proj):
                bound = weight.size(-1) ** -0.5
                init.uniform_(weight, -bound, bound)
        # Parents come after their children: gates and budgets start open.
        elif isinstance(module, MemoryLayer):
            init.ones_(module.lin_gate.bias)
        elif isinstance(module, MocaLayer) and module.budget is not None:
            init.constant_(module.budget[2].bias, 3.0)
        # What is read is found if the router sends a place to one slot in all phases, so they start alike.
        elif getattr(module, "phase", None) is not None and self.config.num_phases > 1:
            init.zeros_(module.phase.weight)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips modules without tensors of their own, such as layers.
        super()._initialize_weights(module, is_custom_code=False)

    def aux_losses(self, records: tuple[MocaRecord, ...], present: Present) -> dict[str, Tensor]:
        """Unscaled losses with a non-zero coefficient, averaged over layers.

        In processes that train together the balancing loss counts the edges of all of them: a collective.

        Args:
            records: What the layers did.
            present: Their tokens; collisions are those of tokens before the first delimiter.
        """
        config = self.config
        terms: dict[str, list[Tensor]] = {}
        for record in records:
            if config.router_aux_loss_coef and record.experts is not None:
                counts = losses.wanted(record.experts)
                if self.training and torch.is_grad_enabled():
                    counts = losses.over_ranks(counts)
                value = losses.balance(record.experts.routing, counts=counts)
                terms.setdefault("balance", []).append(value)
            if config.collision_coef and record.memory is not None:
                value = losses.collision(
                    record.memory.routing.logits, present.sequence, present.shape[0], present.phase == 0
                )
                terms.setdefault("collision", []).append(value)
            if config.budget_coef and record.usage is not None:
                value = self.base_model.budget_strength * losses.budget(
                    record.usage, record.budget, config.budget_limit
                )
                terms.setdefault("budget", []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def with_aux_losses(self, task: Tensor, aux: dict[str, Tensor]) -> Tensor:
        """What is trained: the loss of the task, and the others times their coefficients."""
        weights = {"balance": self.config.router_aux_loss_coef}
        for name, value in aux.items():
            task = task + weights.get(name, getattr(self.config, f"{name}_coef", 0.0)) * value
        return task

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through; see :func:`~graphmoe.models.cost.active_parameters`."""
        return active_parameters(self)
