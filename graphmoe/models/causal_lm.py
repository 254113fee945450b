"""The language model: a true transformers model whose blocks are the relations of the typed graph."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

from graphmoe.errors import ConfigError
from graphmoe.models.aux_losses import AuxLosses
from graphmoe.models.blocks import build_block
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.head import next_token_loss
from graphmoe.models.memory_cache import remember
from graphmoe.models.outputs import GraphMoECausalLMOutput, GraphMoEModelOutput
from graphmoe.models.pretrained import GraphMoEPreTrainedModel
from graphmoe.nn import RMSNorm, rotary


class GraphMoEModel(GraphMoEPreTrainedModel):
    """The blocks without a head: a decoder, or with ``is_causal=False`` an encoder, whose tokens attend to
    all present tokens of their sequence.

    Takes and returns what transformers' decoders do; an encoder has no cache.
    """

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
        use_cache = use_cache and self.config.is_causal
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        if cache is not None and self.config.num_memory_slots:
            remember(cache)
        past = cache.get_seq_length() if cache is not None else 0
        if past + x.size(1) > self.config.max_position_embeddings:
            what, most = "sequence is longer than the model takes", self.config.max_position_embeddings
            raise ConfigError(
                what, "input_ids", f"at most max_position_embeddings = {most}", past + x.size(1)
            )
        if position_ids is None:
            position_ids = (torch.arange(x.size(1), device=x.device) + past).unsqueeze(0)
        mask = create_causal_mask(  # bidirectional if the config is not causal
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
        states, records, remembered = [x], [], []
        for index, layer in enumerate(self.layers):
            options = {**shared, "layer": index}
            if policy == "block":
                x, *did = checkpoint(layer, x, position, use_reentrant=False, **options)
            else:
                x, *did = layer(x, position, **options)
            states.append(x)
            for kept, record in zip((records, remembered), did, strict=True):
                if record is not None:
                    kept.append(record)
        return GraphMoEModelOutput(
            last_hidden_state=self.norm(x),
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            records=tuple(records),
            memory_records=tuple(remembered),
        )

    def _checkpoint_policy(self) -> str:
        """What this pass computes again in its backward pass."""
        if not self.training:
            return "none"
        policy = self.config.checkpoint_policy
        return "block" if policy == "none" and self.gradient_checkpointing else policy


class GraphMoEForCausalLM(AuxLosses, GraphMoEPreTrainedModel, GenerationMixin):
    """Decoder language model of routed, coupled, collaborating and ghost experts.

    ``collab_rounds`` and ``reasoning_steps`` of a forward pass, and of ``generate``, are other numbers of
    rounds of collaboration and of passes of the experts than those of the configuration: fewer make decoding
    cheaper.

    The losses of its experts, and what has to be known of them where processes train together, are those of
    :class:`~graphmoe.models.aux_losses.AuxLosses`.

    Raises:
        ConfigError: A configuration that is not causal.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' name)

    def __init__(self, config: GraphMoEConfig):
        if not config.is_causal:
            what = "a language model must not see the tokens that it predicts"
            raise ConfigError(what, "is_causal", True, config.is_causal)
        super().__init__(config)
        self.model = GraphMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.build_aux_losses()
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
            aux = self.aux_losses(outputs, attention_mask)
            total = self.with_aux_losses(lm_loss, aux)
        records = outputs.records
        wanted = self.config.output_records if output_records is None else output_records
        return GraphMoECausalLMOutput(
            loss=total,
            logits=logits,
            lm_loss=lm_loss,
            aux_losses=aux,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            router_logits=tuple(r.routing.logits for r in records) if output_router_logits else None,
            records=records if wanted else None,
            memory_records=outputs.memory_records if wanted else None,
        )
