"""A classifier of sequences: the blocks of the language model, pooled, as a true transformers model."""

from torch import Tensor, nn

from graphmoe.errors import ConfigError
from graphmoe.models.aux_losses import AuxLosses
from graphmoe.models.causal_lm import GraphMoEModel
from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.models.outputs import GraphMoESequenceClassifierOutput
from graphmoe.models.pretrained import GraphMoEPreTrainedModel
from graphmoe.nn import RMSNorm

SINGLE_LABEL = "single_label_classification"


class GraphMoEForSequenceClassification(AuxLosses, GraphMoEPreTrainedModel):
    r"""One label for each sequence, from the mean of its present tokens.

    .. math::
        z = W\,\mathrm{norm}\Bigl(\tfrac{1}{n} \sum_{t\ \mathrm{present}} h_t\Bigr) + b

    with dropout before the last map. With ``is_causal=False`` the blocks are an encoder, in which experts
    may choose their tokens; a causal model can be a classifier as well. A sequence of nothing but padding has
    a mean of 0.

    The losses of its experts, and what has to be known of them where processes train together, are those of
    :class:`~graphmoe.models.aux_losses.AuxLosses`.

    Args:
        config: Its ``num_labels`` are the classes, at least 2; ``dropout`` counts before the last map, too.

    Shapes:
        - **input:** ``input_ids [B, T]`` or ``inputs_embeds [B, T, D]``, ``attention_mask [B, T]`` (0 for
          padding, on whichever side), ``labels [B]`` in ``[0, num_labels)``, -100 for no label.
        - **output:** :class:`~graphmoe.models.outputs.GraphMoESequenceClassifierOutput`.

    Raises:
        ConfigError: Fewer than two labels, or another problem than one label a sequence.
    """

    def __init__(self, config: GraphMoEConfig):
        if (config.num_labels or 0) < 2:
            raise ConfigError("nothing to tell apart", "num_labels", "at least 2", config.num_labels)
        if config.problem_type not in (None, SINGLE_LABEL):
            raise ConfigError("another problem", "problem_type", SINGLE_LABEL, config.problem_type)
        # Written down, as transformers' loss would else guess it from the first labels.
        config.problem_type = SINGLE_LABEL
        super().__init__(config)
        self.model = GraphMoEModel(config)
        self.pooled_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.build_aux_losses()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_records: bool | None = None,
        **kwargs,
    ) -> GraphMoESequenceClassifierOutput:
        kwargs.pop("num_items_in_batch", None)  # of the Trainer; every sequence counts once
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            inputs_embeds=inputs_embeds, use_cache=False, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        x = outputs.last_hidden_state  # [B, T, D]
        logits = self.classifier(self.dropout(self.pooled_norm(pool(x, attention_mask))))
        total = task = aux = None
        if labels is not None:
            task = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            aux = self.aux_losses(outputs, attention_mask)
            total = self.with_aux_losses(task, aux)
        records = outputs.records
        wanted = self.config.output_records if output_records is None else output_records
        return GraphMoESequenceClassifierOutput(
            loss=total,
            logits=logits,
            task_loss=task,
            aux_losses=aux,
            hidden_states=outputs.hidden_states,
            router_logits=tuple(r.routing.logits for r in records) if output_router_logits else None,
            records=records if wanted else None,
            memory_records=outputs.memory_records if wanted else None,
        )


def pool(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean of the present tokens of ``x [B, T, D]``, ``[B, D]``; 0 for a sequence without any."""
    if attention_mask is None:
        return x.mean(dim=1)
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ConfigError("no telling which tokens are present", "attention_mask", "[B, T]", shape)
    present = attention_mask.to(x.dtype).unsqueeze(-1)  # [B, T, 1]
    return (x * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
