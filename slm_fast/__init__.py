"""slm_fast: one frozen language model that learns task after task, and answers batches that mix them."""

from __future__ import annotations

from typing import Any

from slm_fast import ops
from slm_fast.errors import InputError, SlmError, WorkError

__version__ = "0.1.0"
__all__ = ["InputError", "Prediction", "ScalableLM", "SlmError", "Task", "WorkError", "ops"]


def __getattr__(name: str) -> Any:
    """The model's classes bring transformers with them, which the operators alone do not need."""
    if name == "ScalableLM":
        from slm_fast.slm import ScalableLM

        return ScalableLM
    if name == "Task":
        from slm_fast.data import Task

        return Task
    if name == "Prediction":
        from slm_fast.predict import Prediction

        return Prediction
    raise AttributeError(f"module 'slm_fast' has no attribute {name!r}")
