from graphmoe.errors import ConfigError
from graphmoe.models.moca_configuration import MocaConfig


class MocaTextConfig(MocaConfig):
    """Configuration of :class:`MocaForSequenceClassification`.

    Args:
        vocab_size: Buckets of words.
        max_position_embeddings: Most words of a text.
        num_ngrams: Buckets of n-grams, an even number, those of characters in the upper half; 0: no n-grams.
        word_ngrams: Shortest and longest run of words.
        character_ngrams: Shortest and longest run of characters.
        ngram_scale: Length of the vector of n-gram weights of a text, for each of the two kinds.
        dropout: Before the last map, in training.
        token_dropout: Words, and apart from them n-grams, that are left out in training, as a fraction.
        label_smoothing: Probability that is spread over all labels in the loss, in training.
        **kwargs: Those of :class:`MocaConfig`, of which ``num_labels`` is at least 2.

    Raises:
        ConfigError: As :class:`MocaConfig`, a fraction outside [0, 1), or an odd number of buckets.
    """

    model_type = "graphmoe_moca_text"

    vocab_size: int = 1 << 14
    hidden_size: int = 64
    intermediate_size: int = 64
    max_position_embeddings: int = 128
    delimiter_token_id: int | None = None
    num_phases: int = 1
    num_slots: int = 16
    collision_coef: float | int = 0.0
    num_ngrams: int = 1 << 17
    word_ngrams: list[int] | None = None
    character_ngrams: list[int] | None = None
    ngram_scale: float | int = 5.0
    dropout: float | int = 0.5
    token_dropout: float | int = 0.1
    label_smoothing: float | int = 0.05

    def __post_init__(self, **kwargs):
        self.word_ngrams = list(self.word_ngrams or (1, 2))
        self.character_ngrams = list(self.character_ngrams or (3, 6))
        super().__post_init__(**kwargs)
        for name in ("dropout", "token_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError("no fraction", name, ">= 0 and < 1", getattr(self, name))
        if self.num_ngrams < 0 or self.num_ngrams % 2:
            raise ConfigError("no two halves", "num_ngrams", "an even number >= 0", self.num_ngrams)
        if not self.ngram_scale > 0:
            raise ConfigError("n-grams without weight", "ngram_scale", "> 0", self.ngram_scale)
