from transformers import PreTrainedConfig

from graphmoe.errors import ConfigError


class MocaConfig(PreTrainedConfig):
    r"""Configuration of :class:`MocaForTokenPrediction`, in transformers' words.

    Args:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Channels ``D`` of a token and of a slot.
        intermediate_size: Channels inside one expert.
        num_hidden_layers: Layers, each with a memory and experts of its own.
        max_position_embeddings: Longest run of tokens between two delimiters.
        delimiter_token_id: Token behind which positions begin again, in a phase of its own; ``None``: none.
        num_phases: Phases a sequence may have: delimiters and one more.
        num_experts: Experts of a layer; 1: a plain feed-forward of their size.
        num_experts_per_tok: Experts a token.
        num_slots: Slots of a memory; 0: no memory.
        num_slots_per_tok: Slots a token.
        num_memory_heads: Attention heads of reading; divides ``hidden_size``.
        memory_binding: Multiply what is written, and what is read, by a map of the position.
        memory_address: What chooses slots: the ``token``, or the ``key``, its position.
        read_dependent_gate: Let the gate of writing see what was read: one step after another.
        router_temperature: Divides the scores of all routers.
        budget_coef: Weight of the budget loss; 0: tokens have no budget.
        budget_limit: Fraction of its edges up to which a token pays nothing.
        edge_floor: Edges whose weight times the budget is below are left out.
        collision_coef: Weight of the expected number of other tokens of a sequence in the slot of a token,
            among those before the first delimiter.
        router_aux_loss_coef: Weight of the load-balancing loss of experts.
        initializer_range: Unused: maps start at the size that their inputs call for.
        output_records: Return routing records by default.

    Raises:
        ConfigError: Sizes that do not fit one another, or a negative coefficient of a loss.
    """

    model_type = "graphmoe_moca"
    keys_to_ignore_at_inference = ("state", "records", "layer_records", "aux_losses", "task_loss")

    vocab_size: int = 129
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 1
    max_position_embeddings: int = 61
    delimiter_token_id: int | None = 127
    num_phases: int = 2
    pad_token_id: int | None = 0
    num_experts: int = 4
    num_experts_per_tok: int = 2
    num_slots: int = 32
    num_slots_per_tok: int = 2
    num_memory_heads: int = 4
    memory_binding: bool = True
    memory_address: str = "token"
    read_dependent_gate: bool = False
    router_temperature: float | int = 1.0
    budget_coef: float | int = 0.05
    budget_limit: float | int = 0.3
    edge_floor: float | int = 0.05
    collision_coef: float | int = 0.02
    router_aux_loss_coef: float | int = 0.01
    initializer_range: float | int = 0.02
    output_records: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        least = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_experts")
        for name in (*least, "max_position_embeddings", "num_phases"):
            if getattr(self, name) < 1:
                raise ConfigError("too small", name, "at least 1", getattr(self, name))
        if self.num_slots < 0:
            raise ConfigError("negative number of slots", "num_slots", "at least 0", self.num_slots)
        for name in ("budget_coef", "collision_coef", "router_aux_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError("negative weight of a loss", name, ">= 0", getattr(self, name))
        if self.budget_coef and not self.num_slots and self.num_experts == 1:
            what = "nothing is routed, so nothing can be saved"
            raise ConfigError(what, "budget_coef", "0 without slots and experts", self.budget_coef)

    @property
    def memory_wants_key(self) -> bool:
        """Whether memories are given the positions of tokens."""
        return self.memory_binding or self.memory_address == "key"
