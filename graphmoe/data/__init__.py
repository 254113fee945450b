"""Corpora as arrays of token ids, and the order in which a training run reads them."""

from graphmoe.data.corpus import Corpus, unigram_loss
from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.data.text import load_text
from graphmoe.data.windows import TokenWindows

__all__ = ["Corpus", "ShardedTokens", "TokenWindows", "load_text", "unigram_loss"]
