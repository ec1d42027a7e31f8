"""Tests that the benchmarks use only slm_fast's public names (no leading underscore)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def defined_in(source: str) -> set[str]:
    """Private names of the functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def uses_of_private_names(source: str, private: set[str]) -> list[str]:
    """Code that imports a private name from slm_fast, or accesses an attribute in `private` on an object other than
    self or cls, also through getattr and the like; and every assignment to `__class__` or call of MethodType."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if names:
            found += [n for n in names if n.startswith("slm_fast") and any(map(is_private, n.split(".")))]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            changed = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            if changed or (node.attr in private and not own):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "delattr", "hasattr"):
            found += [ast.unparse(node) for a in node.args if isinstance(a, ast.Constant) and a.value in private]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "MethodType":
            found.append(ast.unparse(node))
    return found


PRIVATE = {
    name for path in (ROOT / "slm_fast").rglob("*.py") for name in defined_in(path.read_text("utf-8")) if name != "_"
} | {"_C"}
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_benchmark_uses_a_private_name_of_the_package(path: Path) -> None:
    assert uses_of_private_names(path.read_text("utf-8"), PRIVATE) == []


@pytest.mark.parametrize(
    "source",
    [
        "from slm_fast.learn import _Trainer",
        "from slm_fast import _C",
        "import slm_fast._C as kernels",
        "slm._set([])",
        "self.slm._learned",
        "getattr(slm, '_set')([])",
        "layer.forward = MethodType(dense, layer)",
        "module.__class__ = kind",
    ],
)
def test_the_reader_finds_each_kind_of_use(source: str) -> None:
    assert len(uses_of_private_names(source, {"_set", "_learned"})) == 1


@pytest.mark.parametrize(
    "source",
    ["self._set()", "torch.ops.mkldnn._linear_pointwise(x)", "from peft import _x", "module.__class__", "_set = 1"],
)
def test_it_leaves_what_is_ones_own_or_other_libraries_alone(source: str) -> None:
    assert uses_of_private_names(source, {"_set", "_learned"}) == []


def test_the_package_and_the_benchmarks_are_where_it_looks() -> None:
    assert len(FILES) > 20
    assert len(PRIVATE) > 20
