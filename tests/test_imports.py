"""Rules of the code base: layered imports, few importers of each heavy library, file length, no pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import slm_fast

PACKAGE = Path(slm_fast.__file__).parent

# From top to bottom: modules and subpackages may import from their own row and from rows below.
LAYERS = (
    ("cli", "server", "integrations"),
    ("demo", "report", "jobs"),
    ("worker",),
    ("slm",),
    ("answerer",),
    ("keeper", "learn", "evaluate", "predict_file", "tables", "measures"),
    ("predict", "passes", "examples", "origin", "resume", "parquet_output"),
    ("generate", "windows"),
    ("scheduler",),
    ("kv_cache", "encoder_graphs", "distributed"),
    ("warm_start",),
    ("model",),
    ("injection", "configure", "known"),
    ("paging",),
    ("hub",),
    ("remote_store",),
    ("store",),
    ("store_view",),
    ("kept_keys",),
    ("mapped_task",),
    ("task_file",),
    ("schema", "task_tensors", "kept_sum"),
    ("reading",),
    ("query", "random_features", "dtkr", "pool"),
    ("router",),
    ("backbone",),
    ("cuda_graphs",),
    ("loading", "structure"),
    (
        "layers",
        "tokenization",
        "batching",
        "epochs",
        "data",
        "card",
        "heads",
        "tasks",
        "covariance",
        "exact_sum",
        "scatter",
        "sketch",
        "families",
        "identity",
        "given",
        "surroundings",
    ),
    ("inputs",),
    ("readers", "chats", "labels", "prefix"),
    ("delimited", "documents"),
    ("encodings", "columns"),
    ("fields", "files", "streams"),
    ("ops", "memory"),
)
DOOR = ("slm_fast.slm", "integrations")  # methods of ScalableLM import integrations in their bodies
LEAVES = ("errors", "progress", "options", "idle", "collection")  # may be imported anywhere; import only each other
RANK = {part: -i for i, parts in enumerate(LAYERS) for part in parts}


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Full dotted names of all imports in `source`, also inside functions; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def read_package() -> dict[str, set[str]]:
    """Imports of each module of the package. Those in `if` blocks of slm_fast/__init__.py are left out: they are lazy
    or for type checkers."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(("slm_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        source = path.read_text("utf-8")
        if module == "slm_fast":
            source = ast.unparse([n for n in ast.parse(source).body if not isinstance(n, ast.If)])
        found[module] = imports(source, module, is_package=path.name == "__init__.py")
    return found


IMPORTS = read_package()
# Public name of slm_fast -> full dotted name of what it refers to, including lazy imports.
FACE = {name.rpartition(".")[2]: name for name in imports((PACKAGE / "__init__.py").read_text("utf-8"), "slm_fast")}


def part(name: str) -> str:
    """slm_fast.ops.dispatch.operator -> ops"""
    return name.split(".")[1] if "." in name else ""


def inside(module: str) -> set[str]:
    """Other modules of the package that `module` imports."""
    found = set()
    for name in IMPORTS[module]:
        if name.split(".")[0] == "slm_fast":
            name = FACE.get(name.removeprefix("slm_fast."), name)
            while name not in IMPORTS:  # from slm_fast.errors import InputError
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module}


def importers(library: str) -> set[str]:
    return {module for module, names in IMPORTS.items() if any(f"{name}.".startswith(f"{library}.") for name in names)}


def test_the_reader_of_imports_sees_lazy_relative_and_plain_ones() -> None:
    source = "import os.path\ndef f():\n from slm_fast.model import X\n from . import b\n from ..errors import E as e"
    expected = {"os.path", "slm_fast.model.X", "slm_fast.ops.b", "slm_fast.errors.E"}
    assert imports(source, "slm_fast.ops.a") == expected
    assert imports("from . import b", "slm_fast.ops", is_package=True) == {"slm_fast.ops.b"}
    assert {"slm_fast.slm", "slm_fast.ops.retrieve", "slm_fast.router"} <= IMPORTS.keys()
    assert {"slm_fast.answerer", "slm_fast.learn", "slm_fast.errors"} <= inside("slm_fast.slm")
    assert FACE["ScalableLM"] == "slm_fast.slm.ScalableLM"


def test_every_module_has_its_place() -> None:
    known = {"", *RANK, *LEAVES}
    assert {module for module in IMPORTS if part(module) not in known} == set()


def test_imports_point_one_way() -> None:
    upward = [
        f"{module} imports {name}"
        for module in IMPORTS
        if part(module) in RANK
        for name in inside(module)
        if part(name) not in (*LEAVES, "") and RANK.get(part(name), 1) > RANK[part(module)]
        if (module, part(name)) != DOOR
    ]
    assert upward == []


def test_the_leaves_import_only_each_other() -> None:
    for leaf in LEAVES:
        assert {part(name) for name in inside(f"slm_fast.{leaf}")} <= {*LEAVES}


def loaded(modules: Sequence[str], of: Sequence[str]) -> list[str]:
    """Which modules `of` these a fresh interpreter has after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*[name for name in {list(of)} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_package_itself_brings_options_and_errors_only_and_no_torch() -> None:
    assert {part(name) for name in inside("slm_fast")} <= {"options", "errors"}
    assert loaded(["slm_fast", "slm_fast.options", "slm_fast.errors"], ["torch"]) == []


def test_what_takes_seconds_to_import_is_imported_when_it_is_used() -> None:
    slow = ["torch._dynamo", "torch.distributed.fsdp", "transformers.modeling_utils", "scipy", "pandas"]
    assert loaded(["slm_fast.slm"], slow) == []
    assert loaded(["benchmarks.continual.run"], [*slow, "sklearn", "peft"]) == []
    of_stores = ["slm_fast.store", "slm_fast.hub", "slm_fast.tables", "slm_fast.card"]
    assert loaded(of_stores, [*slow, "transformers"]) == []


def test_the_server_and_the_integrations_import_neither_the_command_line_nor_each_other() -> None:
    doors = ("cli", "server", "integrations")
    for module in IMPORTS:
        if part(module) in ("server", "integrations"):
            assert {part(name) for name in inside(module)} & ({*doors} - {part(module)}) == set(), module


def test_the_command_line_reaches_for_server_and_integrations_inside_its_functions_only() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        top = ast.Module([n for n in ast.parse(path.read_text("utf-8")).body if not isinstance(n, ast.FunctionDef)], [])
        names = imports(ast.unparse(top), f"slm_fast.cli.{path.stem}", is_package=path.name == "__init__.py")
        assert not [n for n in names if n.startswith(("slm_fast.server", "slm_fast.integrations", "torch"))], path


def underscored(source: str) -> set[str]:
    """Names with a leading underscore, except _C, that a program imports with `from slm_fast... import`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slm_fast":
            found |= {alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "_C"}
    return found


def test_benchmarks_use_no_underscored_name_of_the_package() -> None:
    assert underscored("from slm_fast.learn import _Hidden, Seen") == {"_Hidden"}
    for path in (PACKAGE.parent / "benchmarks").rglob("*.py"):
        assert underscored(path.read_text("utf-8")) == set(), path


def test_no_file_is_longer_than_a_head_holds() -> None:
    root = PACKAGE.parent
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    long = {}
    for folder in ("slm_fast", "csrc", "benchmarks", "tests"):
        for path in (root / folder).rglob("*"):
            if path.suffix in suffixes and (lines := path.read_text("utf-8").count("\n")) > 400:
                long[str(path.relative_to(root))] = lines
    assert long == {}


def test_an_operators_stem_is_found_in_each_of_its_places() -> None:
    root = PACKAGE.parent
    for stem in ("multi_lora", "retrieve", "key_loss", "adapted_linear", "invariant_linear", "sum_scatters"):
        assert (root / f"slm_fast/ops/{stem}.py").exists()
        assert (root / f"tests/ops/test_{stem}.py").exists()


def test_no_modules_import_each_other_in_a_circle() -> None:
    order = TopologicalSorter({module: inside(module) for module in IMPORTS}).static_order()  # or CycleError
    assert set(order) == set(IMPORTS)


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        (
            "transformers",
            {f"slm_fast.{module}" for module in ("backbone", "loading", "query")}
            | {"slm_fast.integrations.peft_check", "slm_fast.integrations.peft_heads"},
        ),
        ("sentence_transformers", {"slm_fast.query"}),
        ("pyarrow", {"slm_fast.readers", "slm_fast.parquet_output"}),
        ("lm_eval", {"slm_fast.integrations.lm_eval", "slm_fast.integrations.harness"}),
        (
            "safetensors",
            {"slm_fast.task_file", "slm_fast.integrations.peft_export"},
        ),
        ("peft", {"slm_fast.integrations.peft_check"}),
        (
            "ray",
            {f"slm_fast.integrations.ray{part}" for part in ("", "_cluster", "_pool", "_learn")}
            | {"slm_fast.server.ray_serve"},
        ),
        ("huggingface_hub", {"slm_fast.hub", "slm_fast.integrations.peft_files"}),
        ("fsspec", {"slm_fast.remote_store"}),
    ],
)
def test_a_heavy_library_comes_in_by_its_own_door(library: str, doors: set[str]) -> None:
    found = importers(library)
    assert found
    assert found <= doors


def test_triton_is_imported_under_ops_triton_only() -> None:
    assert {module for module in importers("triton") if not module.startswith("slm_fast.ops.triton")} == set()


def test_nothing_is_pickled() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert {module for module, names in IMPORTS.items() if {name.split(".")[0] for name in names} & unsafe} == set()
    calls = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                calls.add(f"{path}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                calls.add(f"{path}:{node.value.lineno}: allow_pickle")
    assert calls == set()


def test_operators_and_stores_come_without_transformers() -> None:
    code = """
import sys
import slm_fast.ops
print(sorted({"transformers", "sentence_transformers", "sklearn", "rich"} & sys.modules.keys()))
import slm_fast.layers, slm_fast.pool, slm_fast.router, slm_fast.store, slm_fast.tasks
from slm_fast import Task
print(sorted({"transformers", "sentence_transformers", "sklearn"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]\n[]\n", 0), run.stderr
