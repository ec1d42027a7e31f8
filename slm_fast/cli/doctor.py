"""`slm-fast doctor`."""

from __future__ import annotations

import argparse

from slm_fast.cli.arguments import Verbs, complain
from slm_fast.errors import SlmError


def add(verbs: Verbs) -> None:
    verbs.add("doctor", run, "show what this installation supports, and why something is missing", store=False)


def run(_: argparse.Namespace) -> int:
    import platform
    from importlib import import_module, metadata

    import torch
    from rich.table import Table

    from slm_fast.loading import PACKAGED, choose_device, choose_dtype, resolve
    from slm_fast.ops import backends
    from slm_fast.ops.dispatch import NATIVE_MISSING
    from slm_fast.tables import console

    table = Table(show_header=False)
    table.add_row("slm_fast", metadata.version("slm-fast"))
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "transformers", "sentence-transformers", "safetensors"):
        table.add_row(package, metadata.version(package))
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none available to torch"
    table.add_row("GPU", gpu)
    table.add_row("default dtype (auto)", str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch."))
    for backend in backends():
        table.add_row(f"backend {backend.name}", backend.why_not() or f"ready on {', '.join(backend.devices)}")
    if NATIVE_MISSING is None:
        info = import_module("slm_fast._C").build_info()
        sets = ", ".join(info["instruction_sets"])
        table.add_row("native kernels", f"using {info['instruction_set']} (built: {sets}); {info['compiler']}")
        table.add_row("CUDA kernels", info["cuda"] or "not built")
    for name in PACKAGED:
        try:
            resolve(name)
            table.add_row(f"backbone {name}", "ready, weights verified")
        except SlmError as error:
            table.add_row(f"backbone {name}", str(error))
    console().print(table)
    if NATIVE_MISSING is not None:
        return complain(f"{NATIVE_MISSING}; until then a CPU runs the reference operators, which are slower", 1)
    return 0
