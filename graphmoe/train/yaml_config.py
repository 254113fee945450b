"""Settings in YAML files, converted by the types of a dataclass rather than by YAML's own rules.

A file is flat: ``name: value`` lines. The settings of a model may stand in a section of their own, as other
systems write them; where a setting stands makes no difference::

    model:
      n_experts: 8
      top_k: 2
    learning_rate: 3.0e-4
"""

import os
import types
from dataclasses import fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from graphmoe.errors import ConfigError
from graphmoe.files import LIMITS, read_bytes
from graphmoe.train.flags import suggestion

SECTION = "model"
"""The only key that may hold settings itself."""

_NULL = "tag:yaml.org,2002:null"
_TRUE, _FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


def read_config(config_class: type, path: str | os.PathLike) -> dict[str, Any]:
    """Read settings from a YAML file and convert each to the type of its field.

    Args:
        config_class: The dataclass whose fields, or aliases of fields, the keys are.
        path: A flat YAML mapping, except for a section ``model``.

    Returns:
        The settings that the file gives, by field name.

    Raises:
        ConfigError: If the file is missing or not such a mapping, or for an unknown key, a key given
            twice (be it once inside the section and once outside), or a value of another type; the key is
            named.
    """
    return convert(config_class, read_flat_yaml(path), path)


def convert(config_class: type, texts: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Convert what :func:`read_flat_yaml` returns to the types of the fields; see :func:`read_config`."""
    hints, names = get_type_hints(config_class), _spellings(config_class)
    values: dict[str, Any] = {}
    for key, text in texts.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            raise ConfigError(f"unknown key {key}{suggestion(key, names)}", path)
        if name in values:
            raise ConfigError(f"key {name} appears twice", path)
        try:
            values[name] = _convert(text, hints[name])
        except ValueError as error:
            got = "null" if text is None else text
            raise ConfigError(f"key {key} has a value of another type", path, str(error), got) from error
    return values


def read_flat_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML mapping of scalars, or lists of scalars, as the text that stands in the file; what stands
    in a section ``model`` becomes part of it.

    YAML 1.1 reads ``1e-3`` as a string, ``no`` as a boolean and ``010`` as eight; the type of the
    field knows better.

    Args:
        path: A file of at most 1 MB.

    Returns:
        The mapping, in the order of the file: text, ``None`` for a plain ``null``, or a list of those.

    Raises:
        ConfigError: If the file is missing, too large, not flat but for that section, has a key twice, or
            uses anchors, aliases or tags; ``where`` has the line.
    """
    text = read_bytes(path, LIMITS["yaml"], error=ConfigError)
    try:
        root = _FlatLoader(text).get_single_node()
        return {} if root is None else _flat_mapping(root)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"file cannot be used as config: {problem}", where) from error


class _FlatLoader(yaml.SafeLoader):
    """Composes nodes, constructs nothing, and refuses what a config has no use for."""

    in_section = False

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mapping = isinstance(event, yaml.MappingStartEvent) and parent is not None
        section = mapping and not self.in_section and _is_section(index)
        nested = mapping and not section
        deep = isinstance(event, yaml.SequenceStartEvent) and isinstance(parent, yaml.SequenceNode)
        if nested or deep:
            raise _problem("nested values are refused", event)
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _problem("anchors and aliases are refused", event)
        if event.tag:
            raise _problem("tags are refused", event)
        self.in_section = self.in_section or section
        node = super().compose_node(parent, index)
        self.in_section = self.in_section and not section
        return node


def _is_section(key: Any) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == SECTION


def _flat_mapping(root: yaml.Node) -> dict[str, Any]:
    if not isinstance(root, yaml.MappingNode):
        raise _problem("it is no list of `name: value` lines", root)
    lines: list[tuple[yaml.Node, yaml.Node | None]] = []
    for key, value in root.value:
        if isinstance(value, yaml.MappingNode):
            lines += [(key, None), *value.value]
        else:
            empty = _is_section(key) and value.tag == _NULL
            lines.append((key, None if empty else value))
    mapping, seen = {}, set()
    for key, value in lines:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key has to be a word", key)
        if key.value in seen:
            raise _problem(f"key {key.value} appears twice", key)
        seen.add(key.value)
        if value is not None:
            mapping[key.value] = _node_text(value)
    return mapping


def _node_text(node: yaml.Node) -> str | list | None:
    if isinstance(node, yaml.SequenceNode):
        return [_node_text(item) for item in node.value]
    return None if node.tag == _NULL else node.value


def _problem(text: str, at: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)


def _spellings(config_class: type) -> dict[str, str]:
    """Every accepted key, and the field it means."""
    names = {}
    for field in fields(config_class):
        for word in (field.name, *field.metadata.get("aliases", ())):
            names[word.lstrip("-").replace("-", "_")] = field.name
    return names


def _convert(text: Any, hint: Any) -> Any:
    """Convert the text of a YAML scalar (``None`` for null) or list; a ``ValueError`` says what fits."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(text, members)
    if origin is Literal:
        choices = {str(choice): choice for choice in members}
        if not isinstance(text, str) or text not in choices:
            _refuse(f"one of {', '.join(choices)}")
        return choices[text]
    if origin is list:
        if not isinstance(text, list):
            _refuse("a list")
        return [_convert(item, members[0]) for item in text]
    if not isinstance(text, str):
        _refuse("a single value")
    if hint is bool:
        return _convert_bool(text)
    if hint in (int, float):
        return _convert_number(text, hint)
    return hint(text)


def _convert_union(text: Any, members: tuple) -> Any:
    if text is None and type(None) in members:
        return None
    kinds = [member for member in members if member is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(text, kind)
        except ValueError:
            continue
    return _convert(text, kinds[-1])


def _convert_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        _refuse("true or false")
    return text.lower() in _TRUE


def _convert_number(text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return _refuse("an integer" if kind is int else "a number")


def _refuse(expected: str) -> NoReturn:
    raise ValueError(expected)
