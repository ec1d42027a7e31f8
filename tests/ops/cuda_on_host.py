"""Compiles CUDA code for the CPU, with cuda_on_host.h as CUDA's headers and launches and shared variables rewritten."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from slm_fast.ops import dispatch

ROOT = Path(__file__).parents[2]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
no_extension = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
no_gpu = pytest.mark.skipif(
    dispatch.CUDA_MISSING is not None or not torch.cuda.is_available(), reason=dispatch.CUDA_MISSING or "no GPU"
)


def compile_for_host(source: str, entry: str, folder: Path):
    """Compile CUDA `source` followed by `entry` and return the C function `run` that `entry` defines."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    for header in ("cuda.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h", "cooperative_groups.h"):
        (folder / header).write_text('#include "cuda_on_host.h"\n')
    source = re.sub(r"([\w]+(?:<[^<>;]*>)?)<<<(.*?)>>>\((\w+)\);", r"on_host::launch(\2)([&] { \1(\3); });", source)
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"auto* \2 = reinterpret_cast<\1*>(on_host::shared_memory);", source
    )
    source = re.sub(r"__shared__ (\w+) (\w+);", r"\1& \2 = on_host::shared<\1, __COUNTER__>();", source)
    source = source.replace('#include "kernels.h"', '#include "cuda/kernels.h"')
    (folder / "kernels.cpp").write_text(source + "using namespace slm_fast;" + entry)
    include = [f"-I{path}" for path in (folder, ROOT / "tests/ops", ROOT / "csrc/cuda", ROOT / "csrc")]
    # -fno-gnu-unique: loaded libraries that include this header must not share its thread-local variables.
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-fno-gnu-unique", "-shared", "-pthread", "-w", *include]
    subprocess.run([*command, str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")], check=True)
    return ctypes.CDLL(str(folder / "kernels.so")).run


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
