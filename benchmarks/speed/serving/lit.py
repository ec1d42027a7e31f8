"""Our model behind LitServe, which starts it in a process of its own and therefore must import it by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import litserve
import torch

from slm_fast import ScalableLM


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Requests of several texts, which are batched together."""

    def __init__(self, store: str, dtype: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.store, self.dtype, self.threads = store, dtype, threads

    def setup(self, device: Any) -> None:
        torch.set_num_threads(self.threads)
        self.slm = ScalableLM.from_pretrained(self.store, dtype=self.dtype)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe derives a schema from its annotation
        return request["input"]

    def batch(self, inputs: Sequence[Sequence[str]]) -> list[str]:
        self.sizes = [len(texts) for texts in inputs]
        return [text for texts in inputs for text in texts]

    def predict(self, x: Sequence[str]) -> Any:
        return self.slm.predict(x)

    def unbatch(self, output: Any) -> list[Any]:
        ends = list(accumulate(self.sizes))
        return [output[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def encode_response(self, output: Any) -> Any:
        return [{"task": one.task, "label": one.label, "score": one.score} for one in output]
