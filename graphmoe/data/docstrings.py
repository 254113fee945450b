"""Docstrings of the running Python's standard library, each with the package that it comes from."""

import ast
import platform
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from graphmoe.data.documents import no_stdlib, read_text, stdlib_paths
from graphmoe.data.label_files import LabelledRow
from graphmoe.errors import DataError

DOCSTRINGS = "docstrings"
LEAST_MODULES = 3
"""Modules that a package needs, one for each part."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_rows(num_classes: int) -> tuple[str, list[LabelledRow]]:
    """Docstrings of the packages that have the most, in the order of their modules.

    The docstring of a module, class or function is a text, its module a group, its top-level package the
    label. Of equal docstrings the first counts. Packages of fewer than three modules cannot be divided by
    module and are left out.

    Args:
        num_classes: Packages to take.

    Returns:
        What was read, and the rows.

    Raises:
        DataError: If this Python comes without the source of its library, or with fewer packages.
    """
    if num_classes < 2:
        raise DataError("nothing to tell apart", "num_classes", "at least 2", num_classes)
    packages: dict[str, list[LabelledRow]] = defaultdict(list)
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in stdlib_paths():
        module = path.relative_to(root)
        if path.suffix != ".py" or len(module.parts) < 2:
            continue
        for text in _docstrings(path):
            key = " ".join(text.split())
            if key not in seen:
                seen.add(key)
                row = LabelledRow(text, module.parts[0], module.as_posix(), str(root))
                packages[module.parts[0]].append(row)
    if not packages:
        raise no_stdlib()
    whole = [n for n, rows in packages.items() if len({row.group for row in rows}) >= LEAST_MODULES]
    largest = sorted(whole, key=lambda name: (-len(packages[name]), name))[:num_classes]
    if len(largest) < num_classes:
        what = "the standard library has not so many packages"
        raise DataError(what, "num_classes", f"at most {len(largest)}", num_classes)
    rows = [row for name in sorted(largest) for row in packages[name]]
    return f"{DOCSTRINGS} (Python {platform.python_version()})", rows


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, without indentation."""
    try:
        with warnings.catch_warnings():  # of escapes in old modules
            warnings.simplefilter("ignore")
            tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, DataError):  # templates, and files that are no UTF-8
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text and text.strip():
            yield text.strip()
