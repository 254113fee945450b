"""A network that remembers with routed slots and computes with routed experts, as a transformers model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.errors import ConfigError
from graphmoe.models.head import IGNORE
from graphmoe.models.moca_configuration import MocaConfig
from graphmoe.models.moca_outputs import MocaModelOutput, MocaOutput, MocaState, Present
from graphmoe.models.moca_pretrained import MocaPreTrainedModel
from graphmoe.nn import MocaLayer
from graphmoe.typing import MocaRecord


class MocaModel(MocaPreTrainedModel):
    r"""Tokens, their place since the last delimiter and their phase, through layers of slots and experts.

    .. math::
        h_t = \mathrm{LN}(e_{x_t} + P_t), \qquad P_t = p_{t - d(t)} + f_{\phi(t)}

    with :math:`d(t)` the place behind the last delimiter before token ``t`` and :math:`\phi(t)` the number of
    those: a token is found where one of the same place was written, however long the sequence was. Nothing
    else crosses from token to token but the memory. Memories with a key have :math:`P` as theirs. Where there
    are several phases all :math:`f` start at 0: routers would else send a place to one slot when it is
    written and to another when it is read, and no gradient reaches slots that were not chosen.

    ``budget_strength`` is a buffer, a factor of the floor of edges and of the budget loss, which a training
    callback may move; it starts at 1.

    Args:
        config: Sizes.

    Shapes:
        - **input:** ``input_ids [B, T]``; ``attention_mask [B, T]``, 0 for padding, which does not count as
          a place; ``state`` of a call before.
        - **output:** :class:`~graphmoe.models.moca_outputs.MocaModelOutput`.

    Raises:
        ConfigError: More tokens in a row, or more delimiters, than the config promises.
    """

    def __init__(self, config: MocaConfig):
        super().__init__(config)
        size = config.hidden_size
        self.token = nn.Embedding(config.vocab_size, size)
        self.position = nn.Embedding(config.max_position_embeddings, size)
        self.phase = nn.Embedding(config.num_phases, size)
        self.embedding_norm = nn.LayerNorm(size)
        self.layers = nn.ModuleList(
            MocaLayer(
                size,
                config.num_slots,
                config.num_experts,
                slots_per_token=config.num_slots_per_tok,
                k=config.num_experts_per_tok,
                hidden_channels=config.intermediate_size,
                heads=config.num_memory_heads,
                binding=config.memory_binding,
                address=config.memory_address,
                read_dependent_gate=config.read_dependent_gate,
                temperature=config.router_temperature,
                budget=config.budget_coef > 0,
                edge_floor=config.edge_floor,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(size)
        self.register_buffer("budget_strength", torch.ones(()))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: MocaState | None = None,
        **kwargs,
    ) -> MocaModelOutput:
        x, state, records, present = self.encode(input_ids, attention_mask, state)
        return MocaModelOutput(present.spread(x), state, records, present)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, state: MocaState | None
    ) -> tuple[Tensor, MocaState, tuple[MocaRecord, ...], Present]:
        """As :meth:`forward`, of the tokens that are present, ``[N, D]``: padding costs nothing."""
        mask = None if attention_mask is None else attention_mask.bool()
        position, phase, last = self._places(input_ids, mask, state)
        sequence = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1).expand_as(input_ids)
        place = None if mask is None else mask.flatten().nonzero().squeeze(1)
        present = Present(place, sequence, phase, input_ids.shape)
        present = present._replace(sequence=present.take(sequence), phase=present.take(phase))
        where = self.position(present.take(position)) + self.phase(present.phase)
        x = self.embedding_norm(self.token(present.take(input_ids)) + where)
        memories, records = [], []
        key = where if self.config.num_slots and self.config.memory_wants_key else None
        before = (None,) * len(self.layers) if state is None else state.memory
        for layer, memory in zip(self.layers, before, strict=True):
            x, memory, record = layer(
                x, None, memory, key=key, batch=present.sequence, batch_size=len(input_ids),
                strength=self.budget_strength,
            )  # fmt: skip
            memories.append(memory)
            records.append(record)
        return self.norm(x), MocaState(tuple(memories), *last), tuple(records), present

    def _places(
        self, ids: Tensor, mask: Tensor | None, state: MocaState | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Tokens since the last delimiter and delimiters before each token, ``[B, T]``, and both of the next
        token, ``[B]``."""
        there = torch.ones_like(ids) if mask is None else mask.long()
        delimiter = self.config.delimiter_token_id
        ends = torch.zeros_like(ids) if delimiter is None else (ids == delimiter).long() * there
        begun = ids.new_zeros(len(ids)) if state is None else state.position
        passed = ids.new_zeros(len(ids)) if state is None else state.phase
        count = there.cumsum(dim=1) + begun.unsqueeze(1)  # of this token and those before
        through = ends.cumsum(dim=1)
        # Count at the last delimiter, of which there is none at first.
        since = F.pad((count * ends).cummax(dim=1).values, (1, 0))  # [B, T + 1]
        phase = through - ends + passed.unsqueeze(1)
        position = (count - there - since[:, :-1]) * there
        self._check_places(position, phase * there)
        whole = F.pad(count, (1, 0)) if ids.size(1) == 0 else count
        after = (whole[:, -1] - since[:, -1]) if ids.size(1) else begun
        return position, phase.clamp(max=self.config.num_phases - 1), (after, passed + ends.sum(dim=1))

    def _check_places(self, position: Tensor, phase: Tensor) -> None:
        if torch.compiler.is_compiling() or not position.numel():
            return
        for name, value, limit in (
            ("max_position_embeddings", position, self.config.max_position_embeddings),
            ("num_phases", phase, self.config.num_phases),
        ):
            most = int(value.max()) + 1
            if most > limit:
                what = "more than the model was made for: too long a run of tokens, or too many delimiters"
                raise ConfigError(what, name, f"at most {limit}", most)


class MocaForTokenPrediction(MocaPreTrainedModel):
    r"""A label for every token, from what it remembers.

    Args:
        config: Sizes and coefficients of losses.

    Shapes:
        - **input:** as :class:`MocaModel`, and ``labels [B, T]``, that of the token itself (they are not
          shifted), -100 for a token that does not count.
        - **output:** :class:`~graphmoe.models.moca_outputs.MocaOutput`.
    """

    def __init__(self, config: MocaConfig):
        super().__init__(config)
        self.model = MocaModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: MocaState | None = None,
        output_records: bool | None = None,
        **kwargs,
    ) -> MocaOutput:
        x, state, records, present = self.model.encode(input_ids, attention_mask, state)
        logits = self.head(x)  # [N, vocab_size]
        total = task = aux = None
        if labels is not None:
            labels = present.take(labels)
            counts = labels != IGNORE
            task = F.cross_entropy(logits[counts].float(), labels[counts], reduction="sum")
            task = task / counts.sum().clamp(min=1)
            aux = self.aux_losses(records, present)
            total = self.with_aux_losses(task, aux)
        wanted = self.config.output_records if output_records is None else output_records
        experts = tuple(record.experts for record in records if record.experts is not None)
        return MocaOutput(
            loss=total,
            logits=present.spread(logits),
            task_loss=task,
            aux_losses=aux,
            state=state,
            records=experts or None if wanted else None,
            layer_records=records if wanted else None,
        )
