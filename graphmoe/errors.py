"""Typed errors: what went wrong, where (file or field), what was expected and what came."""


class GraphMoEError(Exception):
    """Base of every error the library raises on purpose.

    Args:
        what: One sentence that says what went wrong.
        where: The file, flag or field the sentence is about.
        expected: What would have been accepted.
        got: What came instead.
    """

    def __init__(self, what: str, where: object = "", expected: object = None, got: object = None):
        self.what, self.where, self.expected, self.got = what, str(where), expected, got
        super().__init__(what, self.where, expected, got)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.got is not None:
            text += f"; got {self.got!r}"
        return text


class ConfigError(GraphMoEError, ValueError):
    """A flag, a YAML key or a constructor argument that cannot be used."""


class GraphError(GraphMoEError, ValueError):
    """An ``edge_index`` or node tensor that is not a graph."""


class DataError(GraphMoEError, ValueError):
    """A corpus, shard or tokenizer that cannot be read or is too small."""


class CheckpointError(GraphMoEError, RuntimeError):
    """A run or checkpoint that is missing, damaged or in use."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written; the previous one is untouched."""
