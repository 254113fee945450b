"""Pictures of a run, or of one pass of a model: :func:`visualize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphmoe.checkpoint import RunRecord, read
from graphmoe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from analysis.report import Report


def visualize(
    checkpoint: str | Path | nn.Module,
    plots: str | Sequence[str] = "all",
    out: str | Path | None = None,
    *,
    text: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    input_ids: Tensor | None = None,
) -> Report:
    """Draw what a run has recorded, or with ``text`` or ``input_ids`` what a model does with them.

    Of a run it reads JSON and safetensors only and builds no model. A model is one of this library or one of
    transformers with MoE layers, or the folder of one: its weights are read from safetensors, and no code
    that lies there is run. The pass is that of :func:`graphmoe.trace`.

    Args:
        checkpoint: A run directory, or a ``step-*`` directory in it; a model, or the folder of one.
        plots: ``"all"`` that fit, the name of one, or several names.
        out: Folder to write ``plots/<name>.png`` and ``report.html`` into, such as the run itself;
            without it nothing is written.
        text: A text for the model, or several.
        tokenizer: Of the model, such as those of transformers. Default: the one in its folder.
        input_ids: Token ids ``[B, T]`` in place of a text.

    Returns:
        The figures by name, each drawn when it is first asked for.

    Raises:
        CheckpointError: If there is no readable run or model at ``checkpoint``.
        ConfigError: If a plot does not exist or does not fit, a model is given nothing to read, a text no
            tokenizer, or the model has no MoE layer.
    """
    # matplotlib and jinja2 take a while to import, and `import graphmoe` must not pay for them.
    from analysis.report import Report

    if text is not None and input_ids is not None:
        raise ConfigError("text and input_ids are two inputs", "input_ids", "one of them", "both")
    if text is None and input_ids is None:
        if not isinstance(checkpoint, str | Path):
            what = "a model shows what it does with an input"
            raise ConfigError(what, "text", "text or input_ids", type(checkpoint).__name__)
        record = read(checkpoint)
    else:
        record = _traced(checkpoint, text, tokenizer, input_ids)
    report = Report(record, plots)
    if out is not None:
        report.save(Path(out) / "plots")
        report.to_html(Path(out) / "report.html")
    return report


def _traced(
    checkpoint: str | Path | nn.Module,
    text: str | Sequence[str] | None,
    tokenizer: Any,
    input_ids: Tensor | None,
) -> RunRecord:
    """One pass of a model as a record."""
    import torch

    from graphmoe.trace_record import trace_record
    from graphmoe.tracing import trace

    folder = Path(checkpoint) if isinstance(checkpoint, str | Path) else None
    model = checkpoint if folder is None else _load(folder)
    if tokenizer is None and folder is not None:
        tokenizer = _tokenizer(folder, needed=text is not None)
    if text is not None and tokenizer is None:
        raise ConfigError("a text needs a tokenizer", "tokenizer", "that of the model, or input_ids", None)
    device = next(model.parameters()).device
    mask = None
    if input_ids is None:
        lines = [tokenizer(line)["input_ids"] for line in ([text] if isinstance(text, str) else text)]
        if not lines or not all(lines):
            raise ConfigError("no token in a text", "text", "at least one", lines)
        length = max(len(line) for line in lines)
        input_ids = torch.tensor([line + [0] * (length - len(line)) for line in lines])
        mask = torch.tensor([[1] * len(line) + [0] * (length - len(line)) for line in lines]).to(device)
    inputs = {"input_ids": input_ids.to(device)} | ({} if mask is None else {"attention_mask": mask})
    labels = None
    if tokenizer is not None:
        labels = [tokenizer.decode([number]) for number in input_ids.flatten().tolist()]
    name = type(model).__name__ if folder is None else folder
    return trace_record(trace(model, **inputs), labels, path=name, result={"recipe": type(model).__name__})


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import graphmoe.models  # registers this library's models with the Auto classes

    if not (folder / "config.json").is_file():
        return graphmoe.models.load(folder)  # a run
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
        ).eval()
    except (OSError, ValueError) as error:
        what = "no model that can be read here"
        raise CheckpointError(
            what, folder, "config.json and safetensors of a model that transformers knows", error
        ) from error


def _tokenizer(folder: Path, *, needed: bool) -> Any:
    from transformers import AutoTokenizer

    from graphmoe.checkpoint import latest

    home = folder if (folder / "config.json").is_file() else latest(folder)
    try:
        return AutoTokenizer.from_pretrained(home, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if not needed:
            return None
        what = "no tokenizer that can be read here"
        raise ConfigError(
            what, "tokenizer", f"tokenizer=..., or input_ids; {folder} has none", error
        ) from error
