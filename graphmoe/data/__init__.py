"""Corpora as arrays of token ids, labelled texts and images, and the order in which a run reads them."""

from graphmoe.data.corpus import Corpus, unigram_loss
from graphmoe.data.image_batches import ImageBatches
from graphmoe.data.images import ImageData, load_images
from graphmoe.data.labelled_batches import LabelledBatches
from graphmoe.data.labelled_text import LabelledText, load_classification
from graphmoe.data.sharded_tokens import ShardedTokens
from graphmoe.data.text import load_text
from graphmoe.data.windows import TokenWindows

__all__ = [
    "Corpus",
    "ImageBatches",
    "ImageData",
    "LabelledBatches",
    "LabelledText",
    "ShardedTokens",
    "TokenWindows",
    "load_classification",
    "load_images",
    "load_text",
    "unigram_loss",
]
