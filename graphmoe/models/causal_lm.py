"""The language model: a true transformers model whose blocks are the relations of the typed graph."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

from graphmoe import loss as losses
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.cost import active_parameters
from graphmoe.models.outputs import GraphMoECausalLMOutput, GraphMoEModelOutput
from graphmoe.models.pretrained import GraphMoEPreTrainedModel
from graphmoe.nn import (
    AttendConv,
    Block,
    FeedForward,
    MoELayer,
    OrthogonalityStrength,
    moe_layers,
    rotary,
)
from graphmoe.typing import Record


class GraphMoEModel(GraphMoEPreTrainedModel):
    """The decoder without its head. Takes and returns what transformers' decoders do."""

    def __init__(self, config: GraphMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(build_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # transformers' own name before 5.24
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> GraphMoEModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(x.size(1), device=x.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask,
            cache=cache, position_ids=position_ids,
        )  # fmt: skip
        present = None
        if attention_mask is not None and attention_mask.dim() == 2:
            present = attention_mask[:, -x.size(1) :].bool()
        channels = self.config.hidden_size // self.config.num_attention_heads
        position = rotary(position_ids, channels, theta=self.config.rope_theta, dtype=x.dtype)

        states, records = [x], []
        for index, layer in enumerate(self.layers):
            options = {"mask": mask, "present": present, "cache": cache, "layer": index}
            if self.gradient_checkpointing and self.training:
                x, record = checkpoint(layer, x, position, use_reentrant=False, **options)
            else:
                x, record = layer(x, position, **options)
            states.append(x)
            if record is not None:
                records.append(record)
        return GraphMoEModelOutput(
            last_hidden_state=self.norm(x),
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            records=tuple(records),
        )


class GraphMoEForCausalLM(GraphMoEPreTrainedModel, GenerationMixin):
    """Decoder language model of routed, coupled and ghost experts.

    The strength of the orthogonality losses is a buffer, one value a layer, which a training
    callback may move; it starts at 1 and multiplies both coefficients. With
    ``orthogonality_adaptive`` the callback follows the state of ``orthogonality``, an
    :class:`~graphmoe.nn.OrthogonalityStrength`: the buffer is its strength over its base, the
    coefficient of outputs or, if that is 0, of weights.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' name)

    def __init__(self, config: GraphMoEConfig):
        super().__init__(config)
        self.model = GraphMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("orthogonality_strength", torch.ones(config.num_hidden_layers))
        self.orthogonality = build_orthogonality(config) if config.orthogonality_adaptive else None
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # transformers' own name before 5.24
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_records: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> GraphMoECausalLMOutput:
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        total = lm_loss = aux = None
        if labels is not None:
            total = lm_loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            aux = self.aux_losses(outputs.records, outputs.last_hidden_state, attention_mask)
            for name, value in aux.items():
                total = total + self._coefficient(name) * value
        records = outputs.records
        return GraphMoECausalLMOutput(
            loss=total,
            logits=logits,
            lm_loss=lm_loss,
            aux_losses=aux,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            router_logits=tuple(r.routing.logits for r in records) if output_router_logits else None,
            records=records
            if (self.config.output_records if output_records is None else output_records)
            else None,
        )

    def aux_losses(
        self, records: tuple[Record, ...], x: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Unscaled auxiliary losses with a non-zero coefficient, averaged over layers."""
        if not records:
            return {}
        mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -x.size(1) :].bool()
        terms: dict[str, list[Tensor]] = {}
        for layer, record, strength in zip(
            self.moe_layers(), records, self.orthogonality_strength, strict=True
        ):
            live = torch.ones(record.routing.num_experts, dtype=torch.bool, device=x.device)
            if layer.ghosts is not None:
                live = layer.ghosts() > 0
            if self.config.router_aux_loss_coef:
                terms.setdefault("balance", []).append(losses.balance(record.routing, mask))
            if self.config.router_z_loss_coef:
                terms.setdefault("router_z", []).append(losses.router_z(record.routing, mask))
            if self.config.orthogonality_output_coef and record.expert_mean is not None:
                value = strength * losses.orthogonality(record.expert_mean, live)
                terms.setdefault("orthogonality_output", []).append(value)
            if self.config.orthogonality_weight_coef:
                value = strength * losses.orthogonality(layer.experts.gate_up_proj, live)
                terms.setdefault("orthogonality_weight", []).append(value)
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _coefficient(self, name: str) -> float:
        field = {"balance": "router_aux_loss_coef", "router_z": "router_z_loss_coef"}.get(
            name, f"{name}_coef"
        )
        return getattr(self.config, field)

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in order; their number is that of the records."""
        return moe_layers(self)

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through; see :func:`~graphmoe.models.cost.active_parameters`."""
        return active_parameters(self)


def build_orthogonality(config: GraphMoEConfig) -> OrthogonalityStrength:
    """State of the adaptive strength of orthogonality of a language model."""
    return OrthogonalityStrength(
        config.num_hidden_layers,
        base=config.orthogonality_output_coef or config.orthogonality_weight_coef,
        decay=config.orthogonality_decay,
        interval=config.orthogonality_interval,
        target=config.orthogonality_target,
        low=config.orthogonality_min,
        high=config.orthogonality_max,
    )


def build_block(config: GraphMoEConfig) -> Block:
    """One block of the language model."""
    attend = AttendConv(
        config.hidden_size, config.num_attention_heads,
        kv_heads=config.num_key_value_heads, dropout=config.attention_dropout,
    )  # fmt: skip
    if config.num_experts == 1:
        feed_forward = FeedForward(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
    else:
        feed_forward = MoELayer(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            hidden_channels=config.intermediate_size,
            activation=config.hidden_act,
            coupling=config.coupling,
            coupling_layers=config.coupling_layers,
            coupling_norm=config.coupling_norm,
            coupling_scale=config.coupling_scale,
            strategy=config.hyperedge_strategy,
            hyperedges=config.hyperedges,
            hyperedge_attention=config.hyperedge_attention,
            max_hyperedges=config.max_hyperedges,
            routed_scaling_factor=config.routed_scaling_factor,
            fusion=config.fusion,
            fusion_projection=config.fusion_projection,
            num_ghosts=config.num_ghosts,
            ghost_threshold=config.ghost_activation_threshold,
            ghost_rate=config.ghost_rate,
            ghost_window=config.ghost_window,
            track_outputs=config.track_outputs
            or config.orthogonality_output_coef > 0
            or config.orthogonality_adaptive,
        )
    return Block(
        attend,
        feed_forward,
        config.hidden_size,
        norm_eps=config.rms_norm_eps,
        dropout=config.dropout,
        post_norm=config.post_norm,
    )
