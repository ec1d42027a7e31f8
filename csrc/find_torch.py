"""Finds the torch whose headers the build uses. `import torch` would fail in pip's isolated build environment."""

from __future__ import annotations

import importlib.util
import re
import site
import sys
from pathlib import Path


def is_new_enough(torch: Path) -> bool:
    """Whether this folder is a torch >= 2.10, the first whose stable ABI has everything the operators use."""
    version = torch / "version.py"
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.is_file() else None
    return found is not None and tuple(map(int, found.groups())) >= (2, 10)


def installed_torch() -> Path | None:
    """The torch installed in the target environment, which is not on the path of an isolated build."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # virtual environments do not see user site-packages
        folders.append(site.getusersitepackages())
    return next((torch for folder in folders if is_new_enough(torch := Path(folder) / "torch")), None)


def torch_on_path() -> Path | None:
    """In an isolated build, the torch that setup.py requested because none is installed."""
    spec = importlib.util.find_spec("torch")
    torch = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    return torch if torch is not None and is_new_enough(torch) else None


if __name__ == "__main__":  # a CMake list of two items, either may be empty
    print(installed_torch() or "", torch_on_path() or "", sep=";")
