"""The sentences of docs/architecture.md about who may import whom, checked on the source itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "itjax"
LAYERS = {
    "base": 0,
    "text": 1,
    "parallel": 1,
    "kernels": 1,
    "data": 2,
    "models": 2,
    "hub": 3,
    "objectives": 3,
    "train": 4,
    "evaluation": 4,
}
COMMANDS = 6
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(module: str) -> str:
    """`itjax.data.pack` -> `data`; a command such as `itjax.main` -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def layer(module: str) -> int:
    return LAYERS.get(folder(module), COMMANDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = name(path)
    for module in imports(path):
        if not module.startswith("itjax.") or folder(module) == folder(here):
            continue
        assert layer(module) < layer(here), f"{here} imports {module}, which is not below it"


@pytest.mark.parametrize("path", [path for path in FILES if folder(name(path)) in ("base", "text", "data")], ids=str)
def test_text_and_data_never_import_jax(path):
    assert not [module for module in imports(path) if module.split(".")[0] in ("jax", "flax", "optax", "orbax")]


def test_nnx_stays_under_models():
    users = [path for path in FILES if any("nnx" in module.split(".") for module in imports(path))]
    assert users
    assert {folder(name(path)) for path in users} == {"models"}


def test_ml_collections_stays_in_freeze_and_the_commands():
    users = {name(path) for path in FILES if any(module.startswith("ml_collections") for module in imports(path))}
    assert {user for user in users if layer(user) != COMMANDS} == {"itjax.base.freeze"}


def test_every_file_of_the_map_exists():
    lines = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())).splitlines()
    files = [line.split()[0] for line in lines if line.split() and line.split()[0].endswith(".py")]
    assert len(files) >= 13
    assert [file for file in files if not (PACKAGE / file).is_file()] == []


def test_nothing_on_disk_is_ever_executed_or_unpickled():
    forbidden = {"eval", "exec", "pickle", "dill", "marshal", "shelve"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        used = called | {module.split(".")[0] for module in imports(path)}
        allowed = {"exec"} if name(path) == "itjax.evaluation.inside" else set()  # the sandbox's own child process
        assert used & forbidden <= allowed, f"{path}: {used & forbidden}"


def test_every_module_says_what_it_is():
    assert [
        str(path) for path in FILES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ] == []
