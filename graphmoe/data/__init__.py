"""Corpora as arrays of token ids, labelled texts, and the order in which a training run reads them."""

from graphmoe.data.corpus import Corpus, unigram_loss
from graphmoe.data.labelled_batches import LabelledBatches
from graphmoe.data.labelled_text import LabelledText, load_classification
from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.data.text import load_text
from graphmoe.data.windows import TokenWindows

__all__ = [
    "Corpus",
    "LabelledBatches",
    "LabelledText",
    "ShardedTokens",
    "TokenWindows",
    "load_classification",
    "load_text",
    "unigram_loss",
]
