"""Compile all GPU kernels, without a GPU, and tabulate the registers, stack and shared memory of each.

    python tests/ops/compile_kernels.py BUILD TABLE.csv [float32 bfloat16 ...]

BUILD: the folder where CMake compiled the CUDA kernels. The Triton kernels are compiled here, as the operators would
launch them; the interpreter that the tests use does not show any of this. Fails if a kernel does not compile or needs
more shared memory than a block may use. Takes a few minutes, with a process on every processor.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.tables import write_csv
from slm_fast.ops.triton import adapted_linear, increments, key_loss, multi_lora, retrieve, search

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes per block, by sm version
RUN = JITFunction.run
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiler:
    """Replaces Triton's driver: a launch only compiles the kernel for `architecture` and adds its usage to `rows`."""

    def __init__(self, architecture: int) -> None:
        self.architecture, self.seen, self.rows = architecture, set(), []
        JITFunction.run = lambda kernel, *args, grid, warmup, **options: self.compile(kernel, args, grid, options)
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: self.architecture,
                get_current_stream=lambda device: 0,
                get_current_target=lambda: GPUTarget("cuda", self.architecture, 32),
            )
        )

    def compile(self, kernel, args, grid, options):
        compiled = RUN(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            [row] = usage(file.name)
        types = next((str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)), "")
        row |= {"architecture": f"sm_{self.architecture}", "language": "triton", "kernel": kernel.__name__}
        self.rows.append(row | {"dtype": types, "shared": compiled.metadata.shared})
        print(*self.rows[-1].values(), flush=True)


def usage(file):
    """Resource usage of each kernel in a cubin or object file, as table rows."""
    text = subprocess.run([TOOL, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    arch, kernel, rows = "", "", []
    for line in text.splitlines():
        arch = found[1] if (found := re.search(r"(?:arch = |EF_CUDA_)(sm_?\d+a?)", line)) else arch
        kernel = found[1] if (found := re.search(r"Function ([^:]+):", line)) else kernel
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            rows.append({"architecture": arch, "language": "cuda", "kernel": kernel, "dtype": ""})
            rows[-1] |= {"registers": registers, "stack": stack, "shared": shared}
    return rows


def demangled(names):
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    names = text.replace("(anonymous namespace)::", "").replace("slm_fast::cuda::", "").splitlines()
    return [re.sub(r"^void |\(.*", "", name) for name in names]


def launch_all(dtype: torch.dtype) -> None:
    """Launch every variant of every kernel, so that it is compiled. Nothing runs: results are meaningless."""

    def lora(B, T, H, P, K, r):
        x, a, b = (torch.zeros(shape, dtype=dtype) for shape in ((B, T, H), (P, r, H), (P, r, H)))
        ids, weights = torch.zeros(B, K, dtype=torch.int64), torch.zeros(B, K)
        for base in (x, None):
            multi_lora.forward(x, a, b, ids, weights, base)
        multi_lora.backward(x, x, a, b, ids, weights, [True] * 4)
        if dtype != torch.float64 and K * r <= 256 // dtype.itemsize:
            adapted_linear.forward(x, torch.zeros(H, H, dtype=dtype), x[0, 0], a, b, ids, weights)

    lora(32, 128, 768, 20, 4, 12)  # prefill
    lora(8, 512, 4096, 20, 4, 8)
    lora(8, 512, 4096, 20, 4, 32)  # as many columns as fit at once
    lora(1, 1, 1, 1, 1, 1)  # Triton specialises on arguments equal to 1
    lora(2, 128, 4096, 20, 4, 64)  # more columns than fit at once
    lora(4, 1, 4096, 100, 2, 8)  # decode
    lora(64, 1, 4096, 16, 2, 4 if dtype == torch.float64 else 8)  # decode with all slots
    query, keys = torch.ones(32, 768, dtype=dtype), torch.ones(5000, 768, dtype=dtype)
    mask, bias = torch.ones(5000, dtype=torch.bool), torch.ones(5000)
    for k in (1, 4, 128):
        retrieve.forward(query, keys, k, 6, None, None, "cosine", "mean", "ratio", 1.0)
        retrieve.forward(query, keys, k, 6, None, mask, "cosine", "vote", "softmax", 2.0)
    retrieve.forward(query, keys, 4, 1, bias, mask, "dot", "mean", "softmax", 2.0)
    retrieve.forward(query[:1, :1], keys[:1, :1], 1, 1, None, None, "cosine", "vote", "ratio", 1.0)
    key_loss.forward(query[:1, :1], keys[:1, :1], 1, 1, 0.2, 1)
    _, selected = key_loss.forward(query, keys, 4, 6, 0.2, 2**40)
    key_loss.backward(torch.ones(()), query, keys, selected.zero_())


def compiled(name: str, architecture: int) -> list[dict[str, object]]:
    """Usage of every Triton kernel with numbers of this dtype."""
    compiler = Compiler(architecture)
    for module in (increments, multi_lora, search):
        module.processors = lambda device: 132
    launch_all(getattr(torch, name))
    return compiler.rows


if __name__ == "__main__":
    build, out, *names = sys.argv[1:]
    objects = sorted(Path(build).rglob("*.cu.o"))
    rows = [row for file in objects for row in usage(file)]
    rows = [row | {"kernel": name} for row, name in zip(rows, demangled(row["kernel"] for row in rows), strict=True)]
    jobs = product(names or ("bfloat16", "float16", "float32"), SHARED)
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        rows += chain.from_iterable(pool.map(compiled, *zip(*jobs, strict=True)))
    order = "language", "kernel", "dtype", "architecture"
    rows.sort(key=lambda row: [row[column] for column in order])
    rows = [
        dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)
    ]  # variants with equal usage: one row
    write_csv(
        Path(out), rows, {"shared": "bytes; of CUDA kernels what is static, beside what the device's limit allows"}
    )
    print(f"{len(rows)} kernels, {len(objects)} object files; {out}")
    too_large = [row for row in rows if row["shared"] > SHARED[int(re.sub(r"\D", "", row["architecture"]))]]
    sys.exit(f"too much shared memory: {too_large}" if too_large or not objects else 0)
