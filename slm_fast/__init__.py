"""slm_fast: one frozen language model that learns task after task and answers mixed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_fast.errors import InputError, SlmError, WorkError
from slm_fast.options import LearnOptions, ModelConfig, PredictOptions

if TYPE_CHECKING:
    from slm_fast import ops
    from slm_fast.data import Task
    from slm_fast.evaluate import Evaluation
    from slm_fast.predict import Prediction
    from slm_fast.slm import ScalableLM

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "InputError",
    "LearnOptions",
    "ModelConfig",
    "PredictOptions",
    "Prediction",
    "ScalableLM",
    "SlmError",
    "Task",
    "WorkError",
    "ops",
]

# Imported on first use, because all of them import torch, and some transformers.
_LATER = {
    "Evaluation": "slm_fast.evaluate",
    "Prediction": "slm_fast.predict",
    "ScalableLM": "slm_fast.slm",
    "Task": "slm_fast.data",
    "ops": "slm_fast.ops",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _LATER:
            from importlib import import_module

            module = import_module(_LATER[name])
            return getattr(module, name, module)
        raise AttributeError(f"module 'slm_fast' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})
