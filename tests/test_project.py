"""The promises a reader can check in the text of the project: lint, imports, no executed files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p
    for top in ("graphmoe", "recipes", "analysis", "benchmarks", "examples")
    for p in (ROOT / top).rglob("*.py")
)

# What each part of the library may import of the library.
ALLOWED = {
    "graphmoe._version": set(),
    "graphmoe.errors": set(),
    "graphmoe.typing": {"errors"},
    "graphmoe.graph": {"typing", "errors"},
    "graphmoe.loss": {"typing", "errors"},
    "graphmoe.metrics": {"typing", "errors", "loss"},
    "graphmoe.ops": {"typing", "graph", "errors", "ops"},
    "graphmoe.nn": {"typing", "graph", "ops", "loss", "errors", "nn"},
    "graphmoe.files": {"errors", "_version"},
    "graphmoe.checkpoint": {"typing", "errors", "files", "run_record", "_version"},
    "graphmoe.run_record": {"errors", "files", "_version"},
    "graphmoe.integrations": {"typing", "ops", "errors", "nn", "integrations"},
    "graphmoe.models": {"typing", "graph", "ops", "loss", "errors", "nn", "checkpoint", "models"},
    "graphmoe.data": {"typing", "errors", "data"},
    "graphmoe.train": {
        "typing",
        "graph",
        "ops",
        "loss",
        "metrics",
        "errors",
        "nn",
        "checkpoint",
        "files",
        "train",
    },
    "graphmoe.tracing": {"typing", "graph", "errors", "nn", "integrations"},
    "graphmoe.trace_record": {"typing", "metrics", "errors", "checkpoint", "tracing"},
    "graphmoe.viz": {"errors", "checkpoint", "data", "models", "tracing", "trace_record", "analysis"},
    "graphmoe": {"_version"},
    "analysis": {"typing", "graph", "errors", "checkpoint", "analysis"},
    # The command may be given a model to trace; no plot ever sees one.
    "analysis.__main__": {"viz", "errors", "checkpoint", "analysis"},
}
NN_PARTS = ("attend", "route", "expert", "couple", "fuse", "memory", "sparse")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from graphmoe import loss" imports a module, "from graphmoe.loss import load" a name.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def owner(module: str) -> str | None:
    """The entry of ALLOWED a module belongs to."""
    matches = [name for name in ALLOWED if module == name or module.startswith(f"{name}.")]
    return max(matches, key=len) if matches else None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_direction(path: Path):
    module = module_name(path)
    part = owner(module)
    if part is None:
        assert module.split(".")[0] in ("recipes", "benchmarks", "examples"), (
            f"{module} has no place in the tree"
        )
        return
    for target in imported_modules(path):
        assert not target.startswith("recipes"), f"{module} imports a recipe"
        assert not target.startswith("torch_scatter"), f"{module} reaches torch_scatter directly"
        home = owner(target)
        if home is None or home == "graphmoe" or home == part:
            continue
        assert home.removeprefix("graphmoe.") in ALLOWED[part], f"{module} must not import {target}"


@pytest.mark.parametrize("part", NN_PARTS)
def test_relations_do_not_import_one_another(part: str):
    for path in (ROOT / "graphmoe" / "nn" / part).glob("*.py"):
        for target in imported_modules(path):
            for other in set(NN_PARTS) - {part}:
                assert not target.startswith(f"graphmoe.nn.{other}"), f"{path.name} imports {target}"


def test_import_is_light():
    heavy = ("transformers", "datasets", "matplotlib")
    code = f"import sys, graphmoe; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import graphmoe

    for name in graphmoe.__all__:
        assert getattr(graphmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = graphmoe.nonsense


FORBIDDEN = {
    "torch.load",
    "yaml.load",
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "pickle.dump",
    "pickle.dumps",
}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_never_executed(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN, f"{path}:{node.lineno}"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    assert "pickle" not in imported_modules(path)


def test_recipes_stay_small():
    for path in (ROOT / "recipes").glob("*_lm.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]))
def test_lint(command: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
