"""Settings of a run: one dataclass becomes command-line flags, YAML keys and ``config.yaml``.

A flag beats a key of the ``--config`` file, which beats the config of the run being resumed or
evaluated, which beats the default of the dataclass. A setting that cannot be used is one
:class:`~graphmoe.errors.ConfigError` that names it; nothing is written before all settings are good.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from graphmoe.errors import ConfigError
from graphmoe.files import CONFIG
from graphmoe.train.command import Stopped, exit_code, open_run, resolve_device
from graphmoe.train.flags import read_flags
from graphmoe.train.schedule import lr_schedule
from graphmoe.train.yaml_config import convert, read_config, read_flat_yaml

__all__ = [
    "RUN_ONLY",
    "RunConfig",
    "Stopped",
    "changed",
    "exit_code",
    "flag",
    "from_run",
    "open_run",
    "parse",
    "resolve_device",
    "to_yaml",
    "with_default",
]

RUN_ONLY = ("run_name", "out_dir", "resume", "overwrite", "evaluate")
"""Fields that say where and whether to run, not what: never taken over from the config of a run."""

_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def flag(default: Any, help: str, *, aliases: Sequence[str] = ()) -> Any:
    """Declare a field of a config. A list takes ``dataclasses.field(default_factory=...)`` instead.

    Args:
        default: The default, or ``dataclasses.MISSING`` for a setting that has to be given.
        help: What it is, with its unit. ``%`` has to be doubled.
        aliases: Other spellings, such as ``("--experts",)``.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, "aliases": list(aliases)} if aliases else {"help": help}
    return dataclasses.field(default=default, metadata=metadata)


def with_default(config_class: type, name: str, default: Any) -> Any:
    """Declare the field ``name`` of a config again with another default; what it is and its aliases stay."""
    metadata = config_class.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class RunConfig:
    """The settings that every recipe has; a recipe's config inherits it and adds its own.

    Raises:
        ConfigError: If a value is out of range; ``where`` is the flag.
    """

    max_steps: int = flag(1000, "optimiser steps to train for")
    batch_size: int = flag(16, "sequences in a batch, in all processes together")
    gradient_accumulation_steps: int = flag(1, "batches in an optimiser step")
    learning_rate: float = flag(1e-3, "peak learning rate")
    min_lr_ratio: float = flag(
        0.0, "last learning rate as a fraction of the peak, for schedules that have one"
    )
    optimizer: Literal["adamw", "sgd"] = flag("adamw", "adamw, or sgd with momentum, whose decay is L2")
    momentum: float = flag(0.9, "share of the last update that sgd adds to the next")
    weight_decay: float = flag(0.1, "decoupled weight decay, a step and unit of learning rate")
    adam_beta1: float = flag(0.9, "decay of AdamW's mean of gradients", aliases=["--beta1"])
    adam_beta2: float = flag(0.95, "decay of AdamW's mean of squared gradients", aliases=["--beta2"])
    warmup_steps: int = flag(50, "optimiser steps until the peak learning rate")
    lr_scheduler_type: str = flag("cosine", "learning-rate schedule, a name that transformers knows")
    max_grad_norm: float = flag(
        1.0, "largest norm of all gradients together; inf does not clip", aliases=["--grad_clip"]
    )
    bf16: bool = flag(False, "compute in bfloat16, keep weights in float32")
    compile_model: bool = flag(False, "compile the model with torch.compile; if that fails, run it as it is")
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "what each process of a distributed run holds: the whole model, or slices of it (FSDP2)"
    )
    eval_every: int = flag(100, "optimiser steps between evaluations")
    save_every: int = flag(100, "optimiser steps between checkpoints", aliases=["--save_interval"])
    log_every: int = flag(10, "optimiser steps between lines of metrics", aliases=["--log_interval"])
    track: Literal["tensorboard", "wandb"] | None = flag(None, "also send metrics to this tracker")
    track_project: str | None = flag(
        None, "project of the tracker; implies wandb without --track", aliases=["--wandb_project"]
    )
    keep_checkpoints: int = flag(2, "newest checkpoints to keep")
    seed: int = flag(0, "seed of weights, data order and noise")
    device: Literal["auto", "cpu", "cuda"] = flag(
        "auto", "where to compute; auto takes a GPU if there is one"
    )
    num_threads: int | None = flag(None, "CPU threads of torch; torch decides without it")
    dataset: str = flag("stdlib", "what to train on")
    data_dir: str | None = flag(None, "folder of downloaded or prepared data")
    run_name: str | None = flag(
        None, "name of the run's folder; the recipe's name without it", aliases=["--wandb_run_name"]
    )
    out_dir: str = flag("runs", "folder of all runs")
    resume: bool = flag(False, "go on from the newest checkpoint of the run")
    overwrite: bool = flag(False, "delete the run of this name first")
    evaluate: str | None = flag(None, "folder of a finished run: score it, do not train")

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps")
        for name in (*counts, "eval_every", "save_every", "log_every", "keep_checkpoints"):
            self.require(name, getattr(self, name) >= 1, "a number >= 1")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            self.require(name, math.isfinite(value) and value >= 0, "a finite number >= 0")
        for name in ("adam_beta1", "adam_beta2", "momentum"):
            self.require(name, 0 <= getattr(self, name) < 1, "a number >= 0 and < 1")
        self.require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "a number from 0 to 1")
        self.require("warmup_steps", self.warmup_steps >= 0, "a number >= 0")
        self.require("max_grad_norm", self.max_grad_norm > 0, "a number > 0")
        self.require("seed", 0 <= self.seed < 2**63, "a number from 0 to 2^63 - 1")
        self.require("num_threads", self.num_threads is None or self.num_threads >= 1, "a number >= 1")
        if self.track_project is not None:
            named = bool(_NAME.fullmatch(self.track_project))
            self.require("track_project", named, "a plain name: no / or \\, no . in front")
            self.track = self.track or "wandb"
        plain = self.run_name is None or (_NAME.fullmatch(self.run_name) and ".." not in self.run_name)
        self.require("run_name", bool(plain), "a plain name: no / or \\, no .., no . in front")
        chosen = [f"--{name}" for name in ("resume", "overwrite", "evaluate") if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} cannot be used together", chosen[0])

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Refuse the value of a field unless a condition holds.

        Args:
            name: The field.
            holds: The condition.
            expected: What would have been accepted.

        Raises:
            ConfigError: If it does not hold.
        """
        if not holds:
            raise ConfigError("value cannot be used", f"--{name}", expected, getattr(self, name))


T = TypeVar("T", bound=RunConfig)


def parse(config_class: type[T], argv: Sequence[str] | None, *, prog: str, description: str) -> T:
    """Build a config from the command line, a YAML file and the run that is resumed or evaluated.

    Args:
        config_class: A dataclass derived from :class:`RunConfig`.
        argv: The arguments; ``None`` takes those of the process. Beside one flag a field, there is
            ``--config FILE.yaml``, which may also be given as the only positional argument.
        prog: How the command is called, such as ``python -m recipes.ghost_lm``. Its last dotted word
            is the recipe's name, and names the run when ``run_name`` is not given.
        description: One sentence for ``--help``.

    Returns:
        The config. ``run_name`` is filled in.

    Raises:
        ConfigError: For an unknown flag or key (with a suggestion), a value that cannot be used, a
            missing file, a run of another recipe, a device that is not there, or a learning-rate
            schedule that the loop cannot follow.
    """
    recipe = prog.split()[-1].rpartition(".")[2]
    flags = read_flags(config_class, argv, prog=prog, description=description)
    file = flags.pop("config", None)
    given = ({} if file is None else read_config(config_class, file)) | flags
    given = _base(config_class, given, recipe) | given
    if given.get("run_name") is None:
        given["run_name"] = recipe
    config = _build(config_class, given)
    resolve_device(config.device)
    lr_schedule(config)
    return config


def from_run(config_class: type[T], run_dir: str | os.PathLike) -> T:
    """Rebuild the config of a run, finished or not, from its ``config.yaml``.

    Args:
        config_class: The dataclass it was built from.
        run_dir: The run directory.

    Returns:
        The config. ``run_name`` and ``out_dir`` are those of ``run_dir``, which may have been moved;
        ``resume``, ``overwrite`` and ``evaluate`` have their defaults.

    Raises:
        ConfigError: If ``run_dir`` is no run, or its config does not fit ``config_class``.
    """
    path = Path(run_dir).absolute()
    place = {"run_name": path.name, "out_dir": os.fspath(path.parent)}
    return _build(config_class, _run_settings(config_class, run_dir) | place)


def to_yaml(config: Any, recipe: str) -> bytes:
    """Write a config as the content of ``config.yaml``.

    Args:
        config: An instance of a config dataclass.
        recipe: The name of the recipe.

    Returns:
        YAML with the recipe and every field; :func:`from_run` reads back equal values.
    """
    values = {"recipe": recipe} | {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def changed(old: T, new: T) -> list[str]:
    """Name the fields in which two configs differ, other than :data:`RUN_ONLY`.

    Args:
        old: A config.
        new: A config of the same class.

    Returns:
        The field names, in the order of the dataclass. A resumed run in which any of them differs
        does not repeat the bits of an uninterrupted one.
    """
    names = [field.name for field in dataclasses.fields(new) if field.name not in RUN_ONLY]
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _build(config_class: type[T], values: dict[str, Any]) -> T:
    for field in dataclasses.fields(config_class):
        given = field.name in values or field.default_factory is not dataclasses.MISSING
        if field.default is dataclasses.MISSING and not given:
            raise ConfigError("a value is required", f"--{field.name}")
    return config_class(**values)


def _base(config_class: type[RunConfig], given: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Settings of the run that is resumed or evaluated; none for a new run."""
    if given.get("resume"):
        run_dir = Path(given.get("out_dir", config_class.out_dir)) / (given.get("run_name") or recipe)
        if not (run_dir / CONFIG).is_file():
            raise ConfigError("there is no run to resume", run_dir)
        return _run_settings(config_class, run_dir, recipe)
    if given.get("evaluate"):
        return _run_settings(config_class, given["evaluate"], recipe)
    return {}


def _run_settings(
    config_class: type, run_dir: str | os.PathLike, recipe: str | None = None
) -> dict[str, Any]:
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise ConfigError("this is not a run", run_dir, expected=f"a folder with {CONFIG}")
    texts = read_flat_yaml(path)
    of = str(texts.pop("recipe", recipe or "")).rpartition(".")[2]
    if recipe is not None and of != recipe:
        raise ConfigError("run belongs to another recipe", run_dir, recipe, of)
    values = convert(config_class, texts, path)
    return {name: value for name, value in values.items() if name not in RUN_ONLY}
