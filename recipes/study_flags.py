"""The flags of a comparison of several models."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import TypeVar

from graphmoe.train.config import RUN_ONLY, RunConfig, flag

T = TypeVar("T", bound=RunConfig)

RATES = {"help": "learning rates that each arm chooses from on the first seed"}
"""Metadata of a field of learning rates."""


def some_of(names: Iterable[str]) -> dict[str, str]:
    """Metadata of a field that lists some of ``names``."""
    return {"help": f"some of {', '.join(names)}"}


def shared(config: RunConfig, config_class: type[T], *, less: Collection[str] = ()) -> T:
    """What all models of a comparison have in common.

    Args:
        config: The flags of the comparison.
        config_class: The config of a model, whose fields the comparison has, too.
        less: Fields that keep their default.
    """
    names = {f.name for f in fields(config_class)} - {*RUN_ONLY, *less}
    return config_class(**{name: getattr(config, name) for name in names})


@dataclass(kw_only=True)
class StudyFlags:
    """What every comparison has, to be put before the config of its models: ``class MyConfig(StudyFlags,
    LanguageModelConfig)``. A comparison may have other defaults, and declares its arms itself.

    Raises:
        ConfigError: No seed, learning rates that are not different numbers above 0, or a single one that no
            arm would have.
    """

    num_seeds: int = flag(3, "seeds of each arm, from --seed on")
    learning_rates: list[float] = field(default_factory=lambda: [4e-3], metadata=RATES)

    def __post_init__(self):
        super().__post_init__()
        self.require("num_seeds", self.num_seeds >= 1, "a number >= 1")
        fits = _distinct(self.learning_rates) and min(self.learning_rates) > 0
        self.require("learning_rates", fits, "one or more different numbers > 0")
        (default,) = (f.default for f in fields(self) if f.name == "learning_rate")
        used = self.learning_rate in (default, *self.learning_rates)
        self.require("learning_rate", used, "--learning_rates, from which each arm chooses")

    def require_some_of(self, name: str, known: Iterable[str], *, with_: str | None = None) -> None:
        """Check that the field ``name`` lists different ones of ``known``, and among them ``with_``."""
        chosen, known = getattr(self, name), list(known)
        fits = _distinct(chosen) and set(chosen) <= set(known) and (with_ is None or with_ in chosen)
        whom = "different ones" if with_ is None else f"{with_} and others"
        self.require(name, fits, f"{whom} of {', '.join(known)}")


def _distinct(values: list) -> bool:
    return len(set(values)) == len(values) > 0
