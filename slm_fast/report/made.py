"""How a report was made."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("slm-fast", "torch", "transformers", "scikit-learn", "numpy")


def versions() -> str:
    """Of Python and the packages that matter, in one line."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
