"""Builds the extension slm_fast._C by calling CMake; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DSLM_FAST_CUDA={os.environ.get('SLM_FAST_CUDA', 'auto')}"]
        configure += [f"-DSLM_FAST_OUTPUT={output}", *os.environ.get("CMAKE_ARGS", "").split()]
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("slm_fast: cmake was not found; install cmake, ninja and pybind11, or build with isolation")
            except subprocess.CalledProcessError as error:
                sys.exit(f"slm_fast: building the C++ operators failed (status {error.returncode}); see above")


def torch_is_installed() -> bool:
    """Whether headers can be found: an isolated build cannot import torch, but its environment may well have one."""
    homes = [Path(sysconfig.get_path("purelib")) / "torch"]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        homes.append(Path(spec.origin).parent)
    return any((home / "include/torch/csrc/stable/library.h").exists() for home in homes)


setup(
    ext_modules=[Extension("slm_fast._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
    # Only where there is none: a second torch is gigabytes.
    setup_requires=[] if torch_is_installed() else ["torch>=2.10"],
)
