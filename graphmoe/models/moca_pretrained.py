"""What networks of slots and experts share as transformers models: their initial weights."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from graphmoe.models.moca_configuration import MocaConfig
from graphmoe.nn import ExpertConv, MemoryBank, MemoryLayer, MocaLayer
from graphmoe.nn.route import Router


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

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips modules without tensors of their own, such as layers.
        super()._initialize_weights(module, is_custom_code=False)
