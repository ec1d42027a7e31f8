"""The software versions behind a report."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("slm-fast", "torch", "transformers", "scikit-learn", "numpy")


def versions() -> str:
    """Versions of Python and the main packages, in one line."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
