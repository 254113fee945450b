"""Text that a model continues, within the length it was made for."""

import torch
from torch import Tensor

from graphmoe.data import Corpus
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEForCausalLM
from graphmoe.train.loop import reseed
from recipes.language_model_config import LanguageModelConfig

DEFAULT_PROMPT = 12
"""Tokens of held-out text that are continued where no prompt is given."""


def sample(config: LanguageModelConfig, model: GraphMoEForCausalLM, corpus: Corpus) -> str | None:
    """Continue ``--sample``, or the beginning of the held-out text; a bar marks where the model began.

    Prompt and continuation together are as long as the model takes, at most.

    Returns:
        The text; ``None`` with ``--sample_tokens 0``, without a tokenizer, or of a model of one token.

    Raises:
        ConfigError: The prompt leaves no room for a continuation.
    """
    longest = model.config.max_position_embeddings
    if config.sample_tokens == 0 or corpus.tokenizer is None or longest < 2:
        return None
    text, ids = encode_prompt(config, corpus, longest)
    reseed(config.seed, 0)
    options = {"do_sample": False}
    if config.sample_temperature > 0:
        options = {"do_sample": True, "temperature": config.sample_temperature}
        options |= {"top_k": config.sample_top_k, "top_p": config.sample_top_p}
    out = model.eval().generate(
        ids.to(model.device),
        max_new_tokens=min(config.sample_tokens, longest - ids.size(1)),
        pad_token_id=corpus.tokenizer.eos_token_id,
        **options,
        **knobs(config),
    )
    return f"{text}|{corpus.tokenizer.decode(out[0, ids.size(1) :].tolist())}"


def encode_prompt(config: LanguageModelConfig, corpus: Corpus, longest: int) -> tuple[str, Tensor]:
    """The prompt of a sample and its token ids ``[1, T]``, of a corpus with a tokenizer.

    Args:
        config: Has the prompt, maybe.
        corpus: Has the tokenizer, and the text to begin with if there is no prompt.
        longest: Most tokens that the model takes, at least 2.

    Raises:
        ConfigError: The prompt leaves no room for a continuation.
    """
    if not config.sample:
        start = corpus.held_out[: min(DEFAULT_PROMPT, longest - 1)].tolist()
        return corpus.tokenizer.decode(start), torch.tensor([start])
    ids = corpus.tokenizer(config.sample, return_tensors="pt")["input_ids"]
    if not 1 <= ids.size(1) < longest:
        what, expected = (
            "no prompt that can be continued",
            f"1 to {longest - 1} tokens, one less than --seq_len",
        )
        raise ConfigError(what, "--sample", expected, ids.size(1))
    return config.sample, ids


def knobs(config: LanguageModelConfig) -> dict[str, int]:
    """Arguments of the model's forward that ``--decode_rounds`` and ``--decode_steps`` ask for."""
    asked = {"collab_rounds": config.decode_rounds, "reasoning_steps": config.decode_steps}
    return {name: value for name, value in asked.items() if value is not None}
