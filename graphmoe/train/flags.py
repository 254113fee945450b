"""Command-line flags of a dataclass: only what is given is returned, every error is typed."""

import difflib
from argparse import ArgumentError, Namespace
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from graphmoe.errors import ConfigError

_UNSET = object()


def read_flags(
    config_class: type, argv: Sequence[str] | None, *, prog: str, description: str
) -> dict[str, Any]:
    """Parse command-line arguments into the fields of a dataclass, without filling in defaults.

    Args:
        config_class: The dataclass: one flag a field.
        argv: The arguments; ``None`` takes those of the process.
        prog: How the command is called, for ``--help``.
        description: One sentence, for ``--help``.

    Returns:
        The value of each field that is given, and ``config``, the path of ``--config`` or of the only
        positional argument, if there is one.

    Raises:
        ConfigError: For an unknown flag (with a suggestion) or a value that cannot be used.
    """
    parser = _make_parser(config_class, prog=prog, description=description)
    # argparse leaves what is already in the namespace alone, so the default of a flag shows in --help
    # and a flag that is not given stays recognisable.
    blank = Namespace(**{action.dest: _UNSET for action in parser._actions if action.dest != "help"})
    try:
        namespace, rest = parser.parse_known_args(argv, blank)
    except ArgumentError as error:
        raise ConfigError(error.message, (error.argument_name or "").split("/")[0]) from error
    given = {name: value for name, value in vars(namespace).items() if value is not _UNSET}
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in rest:
        if argument.startswith("-"):
            word = argument.partition("=")[0]
            raise ConfigError(f"unknown flag {word}{suggestion(word, known)}")
    if rest:
        if len(rest) > 1 or "config" in given:
            raise ConfigError("unexpected argument", expected="at most one config file", got=rest[-1])
        given["config"] = rest[0]
    return given


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the known word that is closest, or nothing if none is close."""
    spellings = sorted({name.replace("-", "_") for name in known})
    close = difflib.get_close_matches(word.replace("-", "_"), spellings, n=1)
    if not close:
        return ""
    return f"; did you mean {'--' if word.startswith('-') else ''}{close[0].lstrip('_')}?"


def _make_parser(config_class: type, *, prog: str, description: str) -> Any:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

    parser = Parser(
        config_class,
        prog=prog,
        description=description,
        epilog="The config file may also be given without --config, as the only argument that is no flag.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="file of flags, as `name: value` lines; a flag given here wins"
    )
    for action in parser._actions:
        action.required = False  # a setting without a default may come from the file
    return parser
