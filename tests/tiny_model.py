"""A language model that trains in milliseconds."""

from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
}


def tiny_model(**options) -> GraphMoEForCausalLM:
    return GraphMoEForCausalLM(GraphMoEConfig(**{**SIZES, **options}))
