"""The operators. Each has one public function, one plain PyTorch reference (its specification), and faster backends
that equal it. `ops.backends()` lists those present; `with ops.use_backend(name)` forces one."""

from slm_fast.ops.dispatch import Backend, backends, use_backend
from slm_fast.ops.key_loss import key_loss
from slm_fast.ops.multi_lora import multi_lora
from slm_fast.ops.registration import register_backends
from slm_fast.ops.retrieve import PreparedKeys, Route, prepare_keys, retrieve

__all__ = [
    "Backend",
    "PreparedKeys",
    "Route",
    "backends",
    "key_loss",
    "multi_lora",
    "prepare_keys",
    "retrieve",
    "use_backend",
]

register_backends()
