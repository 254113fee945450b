"""From a configuration to the parts of the language model."""

from graphmoe.models.configuration import GraphMoEConfig
from graphmoe.nn import AttendConv, Block, FeedForward, MemoryLayer, MoELayer, OrthogonalityStrength


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
        kv_heads=config.num_key_value_heads, dropout=config.attention_dropout, causal=config.is_causal,
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
            reasoning_steps=config.reasoning_steps,
            expert_density=config.expert_density,
            expert_distribution=config.expert_distribution,
            router=config.router,
            router_kwargs=router_options(config),
            num_shared_experts=config.num_shared_experts,
            capacity_factor=config.capacity_factor,
            coupling_kwargs=collaboration_options(config) if config.coupling == "collab" else None,
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
        feed_forward.track_attention = config.diversity_coef > 0
    memory = None
    if config.num_memory_slots:
        memory = MemoryLayer(
            config.hidden_size, config.num_memory_slots, config.num_memory_slots_per_tok,
            config.num_memory_heads,
        )  # fmt: skip
    return Block(
        attend,
        feed_forward,
        config.hidden_size,
        norm_eps=config.rms_norm_eps,
        dropout=config.dropout,
        post_norm=config.post_norm,
        memory=memory,
    )


def router_options(config: GraphMoEConfig) -> dict:
    """Arguments of the router of a block."""
    options = {
        "temperature": config.router_temperature,
        "noise_std": config.router_noise_std,
        "scoring_func": config.scoring_func,
    }
    if config.norm_topk_prob is not None:
        options["norm_topk_prob"] = config.norm_topk_prob
    if config.router_bias:
        options |= {"bias": True, "bias_rate": config.router_bias_rate}
    if config.router == "threshold":
        options["decay"] = config.router_threshold_decay
    if config.router == "contextual":
        options["heads"] = config.collab_heads
    return options


def collaboration_options(config: GraphMoEConfig) -> dict:
    """Arguments of the collaboration of a block."""
    return {
        "heads": config.collab_heads,
        "hidden_channels": config.collab_hidden_size,
        "mediator": config.collab_mediator,
        "graph": config.collab_graph,
        "dropout": config.collab_dropout,
        "eps": config.rms_norm_eps,
    }
