"""The language model: a true transformers model whose blocks are the relations of the typed graph."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

from graphmoe import loss as losses
from graphmoe.errors import ConfigError
from graphmoe.models.blocks import build_block, build_orthogonality
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.cost import active_parameters
from graphmoe.models.head import next_token_loss
from graphmoe.models.outputs import GraphMoECausalLMOutput, GraphMoEModelOutput
from graphmoe.models.pretrained import GraphMoEPreTrainedModel
from graphmoe.nn import MoELayer, RMSNorm, moe_layers, rotary
from graphmoe.typing import Record


class GraphMoEModel(GraphMoEPreTrainedModel):
    """The decoder without its head. Takes and returns what transformers' decoders do."""

    def __init__(self, config: GraphMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(build_block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        collab_rounds: int | None = None,
        reasoning_steps: int | None = None,
        **kwargs,
    ) -> GraphMoEModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        if past + x.size(1) > self.config.max_position_embeddings:
            what, most = "sequence is longer than the model takes", self.config.max_position_embeddings
            raise ConfigError(
                what, "input_ids", f"at most max_position_embeddings = {most}", past + x.size(1)
            )
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

        policy = self._checkpoint_policy()
        shared = {"mask": mask, "present": present, "cache": cache, "recompute": policy == "ffn"}
        shared |= {"rounds": collab_rounds, "steps": reasoning_steps}
        states, records = [x], []
        for index, layer in enumerate(self.layers):
            options = {**shared, "layer": index}
            if policy == "block":
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

    def _checkpoint_policy(self) -> str:
        """What this pass computes again in its backward pass."""
        if not self.training:
            return "none"
        policy = self.config.checkpoint_policy
        return "block" if policy == "none" and self.gradient_checkpointing else policy


class GraphMoEForCausalLM(GraphMoEPreTrainedModel, GenerationMixin):
    """Decoder language model of routed, coupled, collaborating and ghost experts.

    ``collab_rounds`` and ``reasoning_steps`` of a forward pass, and of ``generate``, are other numbers of
    rounds of collaboration and of passes of the experts than those of the configuration: fewer make decoding
    cheaper.

    In processes that train together the balancing loss counts the experts' edges of all of them, so a forward
    pass in training mode with ``labels`` and gradients is a collective: every process has to run it.

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
        collab_rounds: int | None = None,
        reasoning_steps: int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> GraphMoECausalLMOutput:
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, collab_rounds=collab_rounds,
            reasoning_steps=reasoning_steps,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = outputs.last_hidden_state[:, keep]
        total = lm_loss = aux = None
        if labels is None:
            logits = self.lm_head(x)
        else:
            lm_loss, logits = next_token_loss(self.lm_head, x, labels, self.loss_function, **kwargs)
            total = lm_loss
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
        counts = [losses.wanted(record) for record in records]
        if self.config.router_aux_loss_coef and self.training and torch.is_grad_enabled():
            counts = losses.over_ranks(torch.stack(counts)).unbind()
        for layer, record, count, strength in zip(
            self.moe_layers(), records, counts, self.orthogonality_strength, strict=True
        ):
            live = torch.ones(record.routing.num_experts, dtype=torch.bool, device=x.device)
            if layer.ghosts is not None:
                live = layer.ghosts() > 0
            if self.config.router_aux_loss_coef:
                terms.setdefault("balance", []).append(losses.balance(record.routing, mask, count))
            if self.config.router_z_loss_coef:
                terms.setdefault("router_z", []).append(losses.router_z(record.routing, mask))
            if self.config.drop_penalty_coef and record.overflow is not None:
                value = losses.drop_penalty(record.routing, record.overflow)
                terms.setdefault("drop_penalty", []).append(value)
            if self.config.diversity_coef:
                terms.setdefault("diversity", []).append(losses.diversity(record.attention))
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
