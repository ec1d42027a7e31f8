"""Builds the extension slm_fast._C with CMake. All other package metadata is in pyproject.toml."""

from __future__ import annotations

import fcntl
import os
import re
import runpy
import subprocess
import sys
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
        build.mkdir(parents=True, exist_ok=True)
        with open(build / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the Makefile begins to build while pip downloads
            (build / "CMakeCache.txt").unlink(missing_ok=True)  # it refers to an isolated build folder that is gone
            try:
                for command in (configure, ["cmake", "--build", str(build)]):
                    subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("slm_fast: cmake was not found; install cmake, ninja and pybind11, or build with isolation")
            except subprocess.CalledProcessError as error:
                sys.exit(f"slm_fast: building the C++ operators failed (status {error.returncode}); see above")


def torch_for_headers() -> list[str]:
    """The torch requirement of the build environment; empty if torch is already installed.

    The version is exact: for a range pip takes the newest, which ignores `-c` and downloads gigabytes. Every version
    from 2.10 on gives the same build. The user's own constraint comes first, because older versions of pip apply it
    here, where a second pin would conflict.
    """
    if runpy.run_path(str(ROOT / "csrc/find_torch.py"))["installed_torch"]() is not None:
        return []
    of_the_user = " ".join(os.environ.get(name, "") for name in ("PIP_BUILD_CONSTRAINT", "PIP_CONSTRAINT"))
    for file in (*map(Path, of_the_user.split()), ROOT / "constraints.txt"):
        pin = re.search(r"^torch *== *[\w.+]+", file.read_text(), re.MULTILINE) if file.is_file() else None
        if pin is not None:
            return [pin.group()]
    return ["torch>=2.10"]


setup(
    ext_modules=[Extension("slm_fast._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
    setup_requires=torch_for_headers(),
)
