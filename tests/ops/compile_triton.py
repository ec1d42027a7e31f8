"""Compiles the Triton kernels for real GPUs on a machine without one, as the operators would launch them.

    python tests/ops/compile_triton.py [float32 bfloat16 ...]

The interpreter, which the tests use, knows nothing of registers and shared memory. Prints each kernel's use of them;
fails where a kernel does not compile or needs more shared memory than a block may have. Takes some minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from slm_fast.ops.triton import adapted_linear, increments, key_loss, multi_lora, retrieve, search

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiler:
    """Stands where the driver would: `architecture` is the GPU there is, a launch compiles and no more."""

    def __init__(self) -> None:
        self.architecture, self.seen, self.too_large = 0, set(), 0
        self.run = JITFunction.run
        JITFunction.run = lambda kernel, *args, grid, warmup, **options: self.compile(kernel, args, grid, options)
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: self.architecture,
                get_current_stream=lambda device: 0,
                get_current_target=lambda: GPUTarget("cuda", self.architecture, 32),
            )
        )

    def compile(self, kernel, args, grid, options):
        compiled = self.run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        shared, limit = compiled.metadata.shared, SHARED[self.architecture]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        used = next((line.strip() for line in text.splitlines() if "REG:" in line), "").partition(" SHARED")[0]
        types = next((str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)), "")
        verdict = "" if shared <= limit else "TOO MUCH"
        self.too_large += shared > limit
        print(f"sm_{self.architecture} {kernel.__name__:18s} {types:9s} {used} shared {shared} {verdict}", flush=True)


def launch_all(dtype: torch.dtype) -> None:
    """Each kernel in each of its forms. Nothing runs, so that what comes back means nothing."""

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
    lora(1, 1, 1, 1, 1, 1)  # Triton makes constants of ones
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


if __name__ == "__main__":
    compiler = Compiler()
    for module in (increments, multi_lora, search):
        module.processors = lambda device: 132
    print("triton", triton.__version__)
    for name in sys.argv[1:] or ("bfloat16", "float32", "float16", "float64"):
        for compiler.architecture in SHARED:
            launch_all(getattr(torch, name))
    sys.exit(f"{compiler.too_large} kernels need too much shared memory" if compiler.too_large else 0)
