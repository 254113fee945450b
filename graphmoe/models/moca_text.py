"""A classifier of texts: slots and experts that read its words in order, and n-grams that vote."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter
from transformers import initialization as init
from transformers.utils import ModelOutput

from graphmoe.errors import ConfigError
from graphmoe.models.moca import MocaModel, MocaPreTrainedModel
from graphmoe.models.moca_text_configuration import MocaTextConfig
from graphmoe.typing import MocaRecord, Record


@dataclass
class MocaClassifierOutput(ModelOutput):
    """Output of :class:`MocaForSequenceClassification`.

    Attributes:
        loss: ``task_loss`` plus every auxiliary loss times its coefficient, scalar.
        logits: ``[B, num_labels]``.
        task_loss: Mean cross-entropy of the labels, nats; in training with label smoothing.
        aux_losses: Unscaled auxiliary losses, averaged over layers, by name.
        records: What the experts of each layer did, with ``output_records=True``.
        layer_records: What each layer did, with ``output_records=True``; its tokens are the words present.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    records: tuple[Record, ...] | None = None
    layer_records: tuple[MocaRecord, ...] | None = None


class NGramVotes(MessagePassing):
    r"""The n-grams of a text vote for labels, as in a linear model of `TF-IDF
    <https://doi.org/10.1108/eb026526>`_ features.

    .. math::
        y_n = \sum_{g \to n} w_{gn} v_g, \qquad
        w_{gn} = a \, \frac{(1 + \ln c_{gn})\, r_g}{\sqrt{\sum_{g'} ((1 + \ln c_{g'n})\, r_{g'})^2}}

    with the number :math:`c_{gn}` of times that n-gram ``g`` occurs in text ``n``, its rarity :math:`r_g`,
    and the sum over the n-grams of one kind: of words, or of characters. What no training text has does not
    vote.

    Edges: n-gram -> text.

    Args:
        num_ngrams: Buckets, those of characters in the upper half.
        out_channels: Labels.
        scale: :math:`a`.
        dropout: Edges left out in training, as a fraction.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** ``ngrams``, ``counts`` and ``texts``, each ``[M]`` int64: edges from n-grams to texts, in
          ascending order of texts; ``num_texts``.
        - **output:** ``[num_texts, out_channels]``; 0 for a text without n-grams.
    """

    def __init__(
        self, num_ngrams: int, out_channels: int, *, scale: float = 5.0, dropout: float = 0.0, **kwargs
    ):
        super().__init__(aggr="sum", node_dim=0, **kwargs)
        self.num_ngrams, self.out_channels = num_ngrams, out_channels
        self.scale, self.dropout, self.fuse = scale, dropout, True
        self.weight = nn.Parameter(torch.empty(num_ngrams, out_channels))
        self.register_buffer("rarity", torch.empty(num_ngrams))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.rarity)

    @torch.no_grad()
    def count(self, frequency: Tensor, num_texts: int) -> None:
        r"""Set rarities :math:`r_g = 1 + \ln\frac{1 + \mathrm{texts}}{1 + f_g}`, 0 where :math:`f_g = 0`.

        Args:
            frequency: ``f``: in how many texts each n-gram occurs, ``[num_ngrams]`` int64.
            num_texts: Of how many.
        """
        if frequency.shape != self.rarity.shape:
            got = tuple(frequency.shape)
            raise ConfigError("not one number for each n-gram", "frequency", f"[{self.num_ngrams}]", got)
        rarity = 1 + ((1 + num_texts) / (1 + frequency.to(self.rarity.dtype))).log()
        self.rarity.copy_(torch.where(frequency > 0, rarity, 0.0))

    def edge_weight(self, ngrams: Tensor, counts: Tensor, texts: Tensor, num_texts: int) -> Tensor:
        """``w``, ``[M]``."""
        weight = (1 + counts.to(self.rarity.dtype).log()) * self.rarity.index_select(0, ngrams)
        kind = 2 * texts + (ngrams >= self.num_ngrams // 2)
        square = weight.new_zeros(2 * num_texts).index_add(0, kind, weight.square())
        return self.scale * weight * square.clamp(min=1e-20).rsqrt().index_select(0, kind)

    def forward(self, ngrams: Tensor, counts: Tensor, texts: Tensor, num_texts: int) -> Tensor:
        weight = self.edge_weight(ngrams, counts, texts, num_texts)
        weight = F.dropout(weight, self.dropout, self.training).to(self.weight.dtype)
        if self.fuse:
            size = torch.bincount(texts, minlength=num_texts)
            start = size.cumsum(0) - size
            return F.embedding_bag(ngrams, self.weight, start, mode="sum", per_sample_weights=weight)
        edges, size = torch.stack([ngrams, texts]), (self.num_ngrams, num_texts)
        return self.propagate(edges, x=(self.weight, None), edge_weight=weight, size=size)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        return edge_weight.unsqueeze(-1) * x_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_ngrams}, {self.out_channels}, scale={self.scale})"


class MocaForSequenceClassification(MocaPreTrainedModel):
    r"""One label for each text, from what slots and experts make of its words, and from its n-grams.

    .. math::
        z = W\,[\operatorname{mean}_t h_t \,\|\, \max_t h_t] + b + \mathrm{Votes}(\mathrm{ngrams})

    with the words :math:`h_t` that left :class:`MocaModel`: each has read, from the memory of its own text,
    what the words before it wrote. In training some words are left out, and some n-grams.

    Args:
        config: Sizes, fractions and coefficients of losses.

    Shapes:
        - **input:** ``input_ids [B, T]``, buckets of words; ``attention_mask [B, T]``, 0 for padding;
          ``labels [B]`` in ``[0, num_labels)``; ``ngrams``, ``counts`` and ``texts``, each ``[M]``, as in
          :class:`NGramVotes`; see :class:`~graphmoe.data.ngrams.TextHasher`.
        - **output:** :class:`MocaClassifierOutput`.

    Raises:
        ConfigError: Fewer than two labels, or n-grams for a model without, or the other way round.
    """

    config: MocaTextConfig
    config_class = MocaTextConfig

    def __init__(self, config: MocaTextConfig):
        if (config.num_labels or 0) < 2:
            raise ConfigError("nothing to tell apart", "num_labels", "at least 2", config.num_labels)
        super().__init__(config)
        self.model = MocaModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.votes = None
        if config.num_ngrams:
            self.votes = NGramVotes(
                config.num_ngrams, config.num_labels, scale=config.ngram_scale, dropout=config.token_dropout
            )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        ngrams: Tensor | None = None,
        counts: Tensor | None = None,
        texts: Tensor | None = None,
        output_records: bool | None = None,
        **kwargs,
    ) -> MocaClassifierOutput:
        if any((edges is None) != (self.votes is None) for edges in (ngrams, counts, texts)):
            expected = "none" if self.votes is None else "ngrams, counts and texts"
            raise ConfigError("edges do not fit the model", "ngrams", expected, "others")
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.training and self.config.token_dropout:
            kept = torch.rand(present.shape, device=present.device) >= self.config.token_dropout
            present = present * kept
        x, _, records, present = self.model.encode(input_ids, present, None)  # [N, D]
        pooled = [
            scatter(x, present.sequence, dim_size=len(input_ids), reduce=reduce) for reduce in ("mean", "max")
        ]
        logits = self.classifier(self.dropout(torch.cat(pooled, dim=1)))
        if self.votes is not None:
            logits = logits + self.votes(ngrams, counts, texts, len(input_ids))
        total = task = aux = None
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            task = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            aux = self.aux_losses(records, present)
            total = self.with_aux_losses(task, aux)
        wanted = self.config.output_records if output_records is None else output_records
        experts = tuple(record.experts for record in records if record.experts is not None)
        return MocaClassifierOutput(
            loss=total,
            logits=logits,
            task_loss=task,
            aux_losses=aux,
            records=experts if wanted else None,
            layer_records=records if wanted else None,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NGramVotes):
            init.zeros_(module.weight)
            init.ones_(module.rarity)
        else:
            super()._init_weights(module)
