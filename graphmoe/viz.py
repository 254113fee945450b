"""Pictures of a run: :func:`visualize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphmoe.checkpoint import read

if TYPE_CHECKING:
    from analysis.report import Report


def visualize(
    checkpoint: str | Path, plots: str | Sequence[str] = "all", out: str | Path | None = None
) -> Report:
    """Draw what a run has recorded; reads JSON and safetensors only and builds no model.

    Args:
        checkpoint: A run directory, or a ``step-*`` directory in it.
        plots: ``"all"`` that fit the run, the name of one, or several names.
        out: Folder to write ``plots/<name>.png`` and ``report.html`` into, such as the run itself;
            without it nothing is written.

    Returns:
        The figures by name, each drawn when it is first asked for.

    Raises:
        CheckpointError: If there is no readable run at ``checkpoint``.
        ConfigError: If a plot does not exist or does not fit the run.
    """
    # matplotlib and jinja2 take a while to import, and `import graphmoe` must not pay for them.
    from analysis.report import Report

    report = Report(read(checkpoint), plots)
    if out is not None:
        report.save(Path(out) / "plots")
        report.to_html(Path(out) / "report.html")
    return report
