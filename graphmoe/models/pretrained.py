"""What the models of this package share as transformers models: initial weights and capabilities."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.nn import (
    AttendConv,
    Block,
    CollabConv,
    ContextualRouter,
    CoupleConv,
    ExpertConv,
    FeedForward,
    GatedFusion,
    HyperCoupleConv,
    MemoryBank,
    MemoryLayer,
    MoELayer,
    OrthogonalityStrength,
    SparseExpert,
)
from graphmoe.nn.route import Router


class GraphMoEPreTrainedModel(PreTrainedModel):
    config: GraphMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("cache",)
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            init.normal_(module.weight, std=std)
            if isinstance(module, ContextualRouter):
                init.normal_(module.identity, std=0.02)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, ExpertConv):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std * self._branch_scale)
        elif isinstance(module, SparseExpert):
            # Sums of fewer terms, as large as those of matrices.
            for layers, size in ((module.gate_up_proj, std), (module.down_proj, std * self._branch_scale)):
                for layer in layers:
                    init.normal_(layer.weight, std=size * layer.density**-0.5)
        elif isinstance(module, CoupleConv):
            # Not the small std of maps that meet normalised tokens: rows meet nothing else on their way,
            # and a coupler that starts near 0 starts as a linear map that learns slowly.
            for lin in (module.lin_neighbor, module.lin_self):
                init.normal_(lin.weight, std=module.in_channels**-0.5)
            init.normal_(module.gate, std=std)
            init.zeros_(module.gate_bias)
            init.normal_(module.adjacency, std=0.02)
        elif isinstance(module, HyperCoupleConv):
            init.normal_(module.lin.weight, std=module.in_channels**-0.5)
            if module.weight is not None:
                init.constant_(module.weight, 0.5413248546129181)  # softplus gives 1
            if module.group_logits is not None:
                init.zeros_(module.group_logits)
            for attention in (module.gather_attention, module.spread_attention):
                if attention is not None:
                    init.normal_(attention, std=std)
        elif isinstance(module, MemoryBank):
            init.normal_(module.slots, std=0.02)
        elif isinstance(module, CollabConv) and module.mediator is not None:
            init.normal_(module.mediator, std=0.02)
        elif isinstance(module, MoELayer) and module.coupling_scale is not None:
            init.constant_(module.coupling_scale, float(module.coupling_start))
        elif isinstance(module, OrthogonalityStrength):
            init.copy_(module.strength, module.first(1.0))
            for buffer in (module.total, module.previous, module.observed):
                init.zeros_(buffer)
        # Modules without a branch of their own have no bias, or one that starts at 0.
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            init.zeros_(module.bias)
        # Modules are initialised children first, so their parents can scale output projections.
        if isinstance(module, AttendConv):
            init.normal_(module.lin_out.weight, std=std * self._branch_scale)
        elif isinstance(module, MemoryLayer):
            init.normal_(module.lin_out.weight, std=std * self._branch_scale)
            init.ones_(module.lin_gate.bias)  # tokens write from the first step on
        elif isinstance(module, FeedForward):
            init.normal_(module.down_proj.weight, std=std * self._branch_scale)
        elif isinstance(module, GatedFusion):
            # A norm behind it sets the size of the branch, and a map that starts small learns slowly.
            normed = self.config.post_norm is not None
            size = module.lin.in_features**-0.5 if normed else std * self._branch_scale
            init.normal_(module.lin.weight, std=size)
        elif isinstance(module, Block) and module.post_norm is not None:
            init.constant_(module.feed_forward_post_norm.weight, float(module.post_norm))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers this skips modules without tensors of their own, such as
        # attention, which would keep its output projection from being scaled. The functions used above
        # leave loaded tensors alone by themselves.
        super()._initialize_weights(module, is_custom_code=False)

    @property
    def _branch_scale(self) -> float:
        return (2 * self.config.num_hidden_layers) ** -0.5
