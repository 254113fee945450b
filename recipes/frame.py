"""What all recipes that train one model share: a run, from the first check of its folder to its pictures."""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from graphmoe import checkpoint, visualize
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig, changed, exit_code, from_run, open_run, parse, to_yaml
from graphmoe.train.logs import RecordLog
from graphmoe.train.loop import Callback, Every, TrainState, fit
from graphmoe.train.ranks import from_main, launched_rank, leave, make_accelerator, require_equal, together
from graphmoe.train.routing import RouterBalance
from graphmoe.train.tracking import TrackedLog, start_tracker
from recipes.reporting import peak_rss_mb, say

if TYPE_CHECKING:
    from accelerate import Accelerator


class Job(ABC):
    """One model, its data and its scores: what a recipe has to say, while :func:`train` does the rest.

    The constructor reads the data, says what it is, and builds the model; it runs in every process, after
    torch was seeded with ``config.seed``, and writes nothing.

    Args:
        config: The flags.
        recipe: Name that the run carries.

    Attributes:
        model: What is trained.
        dataset: Name of the data.
        fingerprint: Identifies the data: all processes and a resumed run must have the same.
        records: What the model's experts did over time, from :meth:`hooks` on.
        setup: What is done with the optimiser before the first step, if anything; from :meth:`hooks` on.
        scored: What :meth:`score` found.
        unit: What a label of a batch is, to count speeds in.
    """

    model: PreTrainedModel
    dataset: str
    fingerprint: str | dict
    records: RecordLog
    setup: Callable[[torch.optim.Optimizer], None] | None = None
    scored: dict[str, float | None]
    unit: ClassVar[str] = "token"

    def __init__(self, config: RunConfig, recipe: str):
        self.config, self.recipe = config, recipe

    @abstractmethod
    def batch(self, index: int, size: int, slots: slice) -> dict:
        """The rows ``slots`` of the global batch ``index`` of ``size`` rows, as arguments of the model; a
        pure function."""

    @abstractmethod
    def score_model(self, model: nn.Module) -> dict[str, float | None]:
        """Figures on held-out data while the model trains; it is in eval mode. Called in every process."""

    @abstractmethod
    def conclude(self, state: TrainState) -> dict:
        """``metrics``, ``chance``, ``baseline`` and more of the trained model, for ``result.json``. Called in
        the main process."""

    @abstractmethod
    def report(self, result: dict) -> None:
        """Say the headline figures, each beside its baseline and its chance level."""

    @classmethod
    @abstractmethod
    def evaluate(cls, config: RunConfig, recipe: str) -> None:
        """Score the finished run ``config.evaluate`` without training."""

    def size(self) -> dict[str, int]:
        """Parameters, and those that a token uses; a job may add what else it costs."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        active = getattr(self.model, "num_active_parameters", lambda: total)()
        return {"params_total": total, "params_active": active}

    def facts(self) -> dict[str, object]:
        """What is written beside the records; ``recipe`` is."""
        return {}

    def record_figures(self) -> Sequence[Callable[[TrainState, nn.Module], dict[str, Tensor]]]:
        """What gives each row of the records further figures, see
        :class:`~graphmoe.train.logs.RecordLog`."""
        return ()

    def movers(self) -> list[Callback]:
        """Callbacks that change the model after a step."""
        return [RouterBalance(self.model)]

    def extras(self) -> tuple[Callable[[Path], None], ...]:
        """What writes further files into each checkpoint, such as a tokenizer's ``save_pretrained``."""
        return ()

    def hooks(self, run_dir: Path, accelerator: "Accelerator") -> list[Callback]:
        """The callbacks of the run, in the order in which they act after a step."""
        config = self.config
        self.records = RecordLog({"recipe": self.recipe} | self.facts(), extras=self.record_figures())
        log = TrackedLog(run_dir, dtype="bf16" if config.bf16 else "fp32", unit=self.unit)
        check = on.Evaluate(self.score_model, log)
        save = on.Save(
            records=self.records,
            extras=self.extras(),
            keep=config.keep_checkpoints,
            facts={"corpus": self.fingerprint},
        )
        return [
            *self.movers(),
            Every(config.log_every, on.Unsharded(self.records)),
            Every(config.log_every, log),
            Every(config.eval_every, check),
            Every(config.save_every, save),
            on.Progress(evaluation=check, unit=self.unit),
        ]

    def score(self, state: TrainState) -> dict[str, float | None]:
        """Figures that it takes all processes to find, kept in ``scored`` for :meth:`conclude`."""
        return {}

    def final_records(self, state: TrainState) -> dict[str, Tensor]:
        """Arrays ``final_...`` of the trained model, for pictures. Called in the main process, before
        :meth:`conclude`."""
        return {}

    def train_beside(
        self, name: str, job_class: "Callable[..., Job] | None" = None, *, data: dict | None = None, **changes
    ) -> dict:
        """Train what the model is compared with, in the folder ``name`` of its run, or go on with it.

        All processes have to call this, so :meth:`score` is the place.

        Args:
            name: Folder of the other run.
            job_class: What is trained there; by default another job of this class.
            data: Further arguments of that job, such as data already at hand.
            changes: Flags in which the other model differs.

        Returns:
            The result of the other run; nothing in processes other than the main one.
        """
        folder = Path(self.config.out_dir) / self.config.run_name
        begun = (folder / name / "config.yaml").is_file()
        place = {"out_dir": str(folder), "run_name": name, "resume": begun, "overwrite": False}
        config = dataclasses.replace(self.config, **changes, **place)
        return train(job_class or type(self), config, self.recipe, pictures=False, **(data or {}))


def train(
    job_class: Callable[..., Job], config: RunConfig, recipe: str, *, pictures: bool = True, **options
) -> dict:
    """Train, score and draw one run; returns its result.

    Under a launcher such as torchrun all its processes call this. The main one writes the run; what it
    cannot do, such as opening a run that exists, ends all of them.

    Args:
        job_class: What is trained.
        config: The flags.
        recipe: Name that the run carries.
        pictures: Whether to draw plots and the report.
        options: Further arguments of the job, such as data already at hand.

    Returns:
        What stands in ``result.json``; nothing in processes other than the main one.
    """
    began = time.perf_counter()
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with together(accelerator):
        if main:
            open_run(config, dry=True)
    with together(accelerator):
        torch.manual_seed(config.seed)
        job = job_class(config, recipe, **options)
    require_equal(accelerator, "data", str(job.fingerprint))
    config, size = job.config, job.size()
    run_dir = Path(config.out_dir) / config.run_name
    with ExitStack() as opened:
        start, result = None, {}
        with together(accelerator):
            if main:
                open_run(config)
                opened.enter_context(checkpoint.RunLock(run_dir))
                start = _prepare(job, run_dir)
                start_tracker(accelerator, config)
        start = from_main(accelerator, start.name if start else "")
        counts = "{params_total:,} parameters".format(**size)
        if size["params_active"] != size["params_total"]:
            counts += f", {size['params_active']:,} active per {job.unit}"
        say(f"model: {counts}; run: {run_dir}")
        hooks = job.hooks(run_dir, accelerator)
        state = fit(
            job.model,
            job.batch,
            config,
            run_dir,
            callbacks=hooks,
            setup=job.setup,
            resume_from=run_dir / start if start else None,
            accelerator=accelerator,
        )
        job.scored = job.score(state)
        with together(accelerator):
            if main:
                final = job.final_records(state)
                if final:
                    job.records.write(state, job.model, final=final)
                result = {"recipe": recipe} | job.conclude(state) | size
                result |= {
                    "seconds": time.perf_counter() - began,
                    "steps": state.step,
                    "peak_rss_mb": peak_rss_mb(),
                    "seed": config.seed,
                    "dataset": job.dataset,
                    "device": str(accelerator.device),
                    "processes": accelerator.num_processes,
                    "versions": checkpoint.versions(),
                }
                checkpoint.write_json(run_dir / "result.json", result)
                if pictures:
                    visualize(run_dir, out=run_dir)
    if main:
        job.report(result)
        say(f"checkpoint{', plots and report.html' if pictures else ''}: {run_dir}")
    return result


def main(
    config_class: type[RunConfig],
    argv: Sequence[str] | None,
    *,
    recipe: str,
    description: str,
    job: type[Job],
) -> int:
    """Run a recipe's command line and return its exit code."""
    transformers_logging.disable_progress_bar()

    def command(argv: Sequence[str] | None) -> None:
        config = parse(config_class, argv, prog=f"python -m recipes.{recipe}", description=description)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if config.evaluate is None:
            train(job, config, recipe)
        elif launched_rank() == 0:
            job.evaluate(config, recipe)

    code = exit_code(command, argv)
    leave()
    return code


def _prepare(job: Job, run_dir: Path) -> Path | None:
    """Write the config of a new run, or find the checkpoint of a resumed one."""
    start, config = None, job.config
    if config.resume:
        start = checkpoint.latest(run_dir)
        different = changed(from_run(type(config), run_dir), config)
        if different:
            say(f"resuming with other settings than before: {', '.join(different)}")
        if start is not None:
            state = checkpoint.read_json(start / "state.json")
            if state.get("corpus") != job.fingerprint:
                say("resuming on other data than before: the corpus has changed")
            say(f"resuming from step {state['step']}")
    checkpoint.atomic_write_bytes(run_dir / "config.yaml", to_yaml(config, job.recipe))
    return start
