from transformers import PreTrainedConfig

from graphmoe.errors import ConfigError

CHECKPOINT_POLICIES = ("none", "ffn", "block")


class GraphMoEConfig(PreTrainedConfig):
    r"""Configuration of :class:`GraphMoEForCausalLM`, in transformers' words.

    Args:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Channels ``D`` of a token.
        intermediate_size: Channels ``F`` inside one expert (or inside the dense feed-forward).
        num_hidden_layers: Blocks ``L``.
        num_attention_heads: Query heads; divides ``hidden_size`` into even parts.
        num_key_value_heads: Key and value heads; divides ``num_attention_heads``. Default: as many.
        max_position_embeddings: Longest sequence the model takes.
        rope_theta: Base of the rotary frequencies.
        hidden_act: ``swiglu`` or ``gelu``, inside experts.
        rms_norm_eps: Added to the mean square in RMSNorm.
        post_norm: Start of the learned gain of an RMSNorm behind experts; ``None``: no such norm.
        dropout: On residual branches, in training.
        attention_dropout: On attention weights, in training.
        initializer_range: Standard deviation of initial weights; output projections are divided by
            ``sqrt(2 L)``.
        num_experts: Primary experts of each block; 1 is a dense model without routing.
        num_experts_per_tok: Experts ``k`` a token, ``1 <= k <= num_experts``.
        expert_density: Edges of an expert, as a share of the places of its matrices, in (0, 1]: its weights
            are edges, which a training callback may let evolve. Not with ghosts, ``reasoning_steps`` or
            ``orthogonality_weight_coef``, which want matrices. ``None`` or 1: matrices.
        expert_distribution: How the maps of an expert share its edges: ``uniform``, ``er`` or ``erk``.
        is_causal: Tokens attend to themselves and earlier ones only; False: to all of their sequence, for
            encoders.
        router: ``topk``, by the token; ``contextual``, by what all experts say about it; ``threshold``, by
            whether the token would be among those that an expert prefers; ``expert_choice``, by the experts,
            who see the whole sequence: not for causal models.
        scoring_func: ``softmax`` or ``sigmoid`` of the scores gives the weights of experts.
        norm_topk_prob: Whether the weights of a token are divided by their sum; ``None``: with ``topk`` and
            ``contextual``.
        router_bias: Balance the load of ``topk`` by a bias that a training callback moves, not by a loss.
        router_bias_rate: What the bias moves by in one optimiser step.
        router_threshold_decay: What a threshold keeps of itself in one optimiser step.
        num_shared_experts: Experts of each block that serve every token beside those it is routed to.
        router_temperature: Divides the scores of the router.
        router_noise_std: Standard deviation of Gaussian noise on the scores, in training.
        capacity_factor: In training, most edges of an expert, as a multiple of the mean; ``None``: no limit.
            What is dropped depends on later tokens, too, so a model that is trained so is causal in eval
            only.
        reasoning_steps: Passes of every expert over its own intermediate result; 0: plain experts.
        num_memory_slots: Slots that each block has for each sequence, written and read token by token; 0: no
            memory.
        num_memory_slots_per_tok: Slots a token reads and writes, ``1 <= k <= num_memory_slots``.
        num_memory_heads: Attention heads of reading; divides ``hidden_size``.
        coupling: How the experts of a token talk: ``none``, ``gnn``, ``hyper`` or ``collab``.
        coupling_layers: Rounds of coupling; ``None``: 1 for ``hyper``, else 2; 0 of ``collab`` is none.
        collab_heads: Attention heads of ``collab`` and of the ``contextual`` router; divides ``hidden_size``.
        collab_hidden_size: Channels inside the feed-forward step of ``collab``. Default: ``hidden_size``.
        collab_mediator: Let a learned mediator collaborate with the experts of a token.
        collab_graph: ``complete``, or ``self``: nobody hears anybody else.
        collab_dropout: On attention weights of ``collab``, in training.
        coupling_norm: RMSNorm of what the rows of a token say to one another.
        coupling_scale: Start of a learned factor of what coupling adds to the rows; ``None``: no factor.
        hyperedge_strategy: ``all_pairs``, ``all_triplets``, ``all`` or ``custom``.
        hyperedges: Experts of each hyperedge of ``custom``, such as ``[[0, 1, 2], [2, 3]]``.
        hyperedge_attention: Attention of hyperedges to their members and of experts to their hyperedges.
        max_hyperedges: Most hyperedges a block may have.
        routed_scaling_factor: What the routing weights of a token sum to.
        fusion: ``sum`` of a token's rows with routing weights, their ``mean``, or ``gated``: the sum and the
            mediator through a gate, then a projection.
        fusion_projection: Linear, GELU and LayerNorm behind the fused rows.
        num_ghosts: Ghost experts of each block.
        ghost_activation_threshold: Saturation above which a ghost wakes.
        ghost_rate: Level a waking ghost gains per optimiser step.
        ghost_window: Optimiser steps that saturation averages over.
        router_aux_loss_coef: Weight of the load-balancing loss.
        router_z_loss_coef: Weight of the router z-loss.
        memory_aux_loss_coef: Weight of the load-balancing loss of memory slots.
        drop_penalty_coef: Weight of the probability of edges that a capacity limit dropped.
        diversity_coef: Weight of the negative entropy of the attention of ``collab``.
        orthogonality_output_coef: Weight of the orthogonality of mean expert outputs.
        orthogonality_weight_coef: Weight of the orthogonality of first expert matrices.
        orthogonality_adaptive: Adapt the strength of orthogonality to the specialisation of each
            layer; see :class:`~graphmoe.nn.OrthogonalityStrength`, whose base is the coefficient of
            outputs or, if that is 0, of weights.
        orthogonality_interval: Optimiser steps between two adjustments.
        orthogonality_decay: Factor of the strength from one layer to the next, in (0, 1].
        orthogonality_target: Specialisation to reach, as a fraction of that of random vectors.
        orthogonality_min, orthogonality_max: Bounds of the adapted strength.
        track_outputs: Keep mean expert outputs in the records of an uncoupled model too.
        output_records: Return routing records by default.
        checkpoint_policy: What is computed again in the backward pass, in training: ``none``, the ``ffn``
            branch of every block, or the whole ``block``. ``gradient_checkpointing_enable()`` takes ``block``
            where it is ``none``.

    Raises:
        ConfigError: Sizes that do not fit one another, a negative coefficient of a loss, or an adaptive
            strength of a loss without a coefficient.
    """

    model_type = "graphmoe"
    keys_to_ignore_at_inference = ("cache", "records", "aux_losses", "lm_loss", "task_loss")

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float | int = 10000.0
    hidden_act: str = "swiglu"
    rms_norm_eps: float = 1e-6
    post_norm: float | int | None = None
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    num_experts: int = 4
    num_experts_per_tok: int = 2
    expert_density: float | int | None = None
    expert_distribution: str = "uniform"
    is_causal: bool = True
    router: str = "topk"
    scoring_func: str = "softmax"
    norm_topk_prob: bool | None = None
    router_bias: bool = False
    router_bias_rate: float | int = 1e-3
    router_threshold_decay: float | int = 0.9
    num_shared_experts: int = 0
    router_temperature: float | int = 1.0
    router_noise_std: float | int = 0.0
    capacity_factor: float | int | None = None
    reasoning_steps: int = 0
    num_memory_slots: int = 0
    num_memory_slots_per_tok: int = 2
    num_memory_heads: int = 4
    coupling: str = "none"
    coupling_layers: int | None = None
    coupling_norm: bool = False
    coupling_scale: float | int | None = None
    collab_heads: int = 4
    collab_hidden_size: int | None = None
    collab_mediator: bool = True
    collab_graph: str = "complete"
    collab_dropout: float | int = 0.0
    hyperedge_strategy: str = "all_pairs"
    hyperedges: list[list[int]] | None = None
    hyperedge_attention: bool = False
    max_hyperedges: int = 4096
    routed_scaling_factor: float | int = 1.0
    fusion: str = "sum"
    fusion_projection: bool = False
    num_ghosts: int = 0
    ghost_activation_threshold: float | int = 0.01
    ghost_rate: float | int = 0.01
    ghost_window: int = 100
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    memory_aux_loss_coef: float | int = 0.01
    drop_penalty_coef: float | int = 0.001
    diversity_coef: float | int = 0.0
    orthogonality_output_coef: float | int = 0.0
    orthogonality_weight_coef: float | int = 0.0
    orthogonality_adaptive: bool = False
    orthogonality_interval: int = 500
    orthogonality_decay: float | int = 0.8
    orthogonality_target: float | int = 0.95
    orthogonality_min: float | int = 1e-3
    orthogonality_max: float | int = 0.3
    track_outputs: bool = False
    output_records: bool = False
    checkpoint_policy: str = "none"

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError("too small", name, "at least 1", getattr(self, name))
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                "heads must divide hidden_size into even parts", "num_attention_heads",
                f"a divisor of {self.hidden_size // 2}", self.num_attention_heads,
            )  # fmt: skip
        if self.num_memory_slots < 0:
            raise ConfigError("negative number of slots", "num_memory_slots", ">= 0", self.num_memory_slots)
        if self.num_memory_slots and not self.is_causal:
            what = "a memory is written from the first token to the last"
            raise ConfigError(what, "num_memory_slots", "0 without is_causal", self.num_memory_slots)
        if self.fusion == "mean" and not (self.router_aux_loss_coef or self.router_z_loss_coef):
            what = "equal weights leave the router nothing to learn from"
            raise ConfigError(what, "fusion", "sum, or a router_aux_loss_coef or router_z_loss_coef", "mean")
        if self.num_experts == 1 and (self.coupling != "none" or self.num_ghosts):
            raise ConfigError(
                "one expert has nobody to couple with or to relieve", "num_experts", "at least 2", 1
            )
        mixture = ("reasoning_steps", "capacity_factor", "router", "router_bias", "num_shared_experts")
        for name in mixture:
            if self.num_experts == 1 and getattr(self, name) not in (0, None, "topk"):
                what = "a dense model has no mixture"
                raise ConfigError(what, name, "not with one expert", getattr(self, name))
        if self.expert_density not in (None, 1):
            self._check_sparse_experts()
        if self.router_bias and self.router != "topk":
            what = "only a token that chooses its experts can be made to choose others"
            raise ConfigError(what, "router_bias", "False, or router topk", True)
        if self.checkpoint_policy not in CHECKPOINT_POLICIES:
            expected = f"one of {', '.join(CHECKPOINT_POLICIES)}"
            raise ConfigError("unknown policy", "checkpoint_policy", expected, self.checkpoint_policy)
        self._check_coefficients()

    def _check_sparse_experts(self) -> None:
        if self.num_experts == 1:
            what = "only experts of a mixture are sparse"
            raise ConfigError(what, "expert_density", "None with one expert", self.expert_density)
        if self.orthogonality_weight_coef:
            what, got = "edges of different experts have different places", self.orthogonality_weight_coef
            raise ConfigError(what, "orthogonality_weight_coef", "0 with expert_density", got)

    def _check_coefficients(self) -> None:
        orthogonality = ("orthogonality_output_coef", "orthogonality_weight_coef")
        routers = ("router_aux_loss_coef", "router_z_loss_coef", "memory_aux_loss_coef")
        for name in (*routers, "drop_penalty_coef", "diversity_coef", *orthogonality):
            if not getattr(self, name) >= 0:
                raise ConfigError("negative weight of a loss", name, ">= 0", getattr(self, name))
        if self.diversity_coef and (self.coupling != "collab" or self.coupling_layers == 0):
            raise ConfigError(
                "no attention whose entropy could count", "diversity_coef", "0, or coupling collab",
                self.diversity_coef,
            )  # fmt: skip
        if self.orthogonality_adaptive and not any(getattr(self, name) for name in orthogonality):
            raise ConfigError(
                "no orthogonality loss whose strength could adapt", "orthogonality_adaptive",
                f"{' or '.join(orthogonality)} above 0", True,
            )  # fmt: skip
