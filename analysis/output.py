"""Putting pictures and pages into files: every one is replaced in one step."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from analysis.style import look
from graphmoe.checkpoint import atomic_write_bytes

DPI = 120


def png(figure: Figure) -> bytes:
    """Return ``figure`` as the content of a PNG file."""
    buffer = io.BytesIO()
    with look():
        figure.savefig(buffer, format="png", dpi=DPI)
    # Saving changes the resolution and changes it back, which matplotlib counts as an edit.
    figure.stale = False
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    """Write a file, with the folders above it, and return its path.

    Raises:
        CheckpointWriteError: If the file system refused; an existing file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, content)
    return path
