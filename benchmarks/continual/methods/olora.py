"""O-LoRA: one LoRA per task, each learned in a subspace orthogonal to the earlier ones; all are summed to answer.

Source: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, Findings of EMNLP 2023
(cmnfriend/O-LoRA). The LoRAs of earlier tasks are active and frozen. That of task t learns from its rows' loss plus
lambda_1 sum_(i<t) sum |A_i A_t^T|, where A [r, I] is the matrix that reads the layer's input. lambda_1 is 0.5 and r is
8, as in the paper. Absolute values are summed, as the released code does (the paper writes squares). No task ID is
needed.

Departures:

- The layers are those that slm_fast adapts by default, and alpha is r (originally: the queries and values of T5 and
  LLaMA, alpha 32, dropout 0.1).
- AdamW, its warm-up and decay, batch size and epochs are those of all rivals here (originally: a constant rate of 1e-3,
  batches of 64, one epoch).
- An encoder, which the paper does not use, answers with one head over all label words. Each task continues to train it,
  as a LoRA cannot contain it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.continual.methods.common import make_model
from benchmarks.continual.methods.method import Answer, Setup, State
from benchmarks.peers import adapted_layers
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.tasks import name_seed

STRENGTH = 0.5  # lambda_1


class OLora:
    """A `Method`. strength: lambda_1 of the penalty."""

    def __init__(self, setup: Setup, *, strength: float = STRENGTH) -> None:
        self.setup, self.strength = setup, strength
        loaded = Backbone.load(setup.backbone)
        self.modules = adapted_layers(loaded)
        self.model = make_model(loaded, setup, setup.labels, setup.options.seed)
        self.loras: list[str] = []  # adapter names; task names may contain dots

    def add(self, seed: int) -> None:
        """Add a LoRA to the others; only the new one trains."""
        import peft  # a slow import

        name, rank = f"lora{len(self.loras)}", self.setup.options.rank
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=self.modules)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.loras:
                self.model.network.add_adapter(name, config)
            else:
                self.model.network = peft.get_peft_model(self.model.network, config, adapter_name=name)
        self.loras.append(name)
        self.model.network.base_model.set_adapter(self.loras)
        for key, parameter in self.model.network.named_parameters():
            parameter.requires_grad_(f".{name}." in key)

    def reading(self, name: str) -> list[Tensor]:
        """The A of one LoRA in each layer, [r, I]."""
        layers = [self.model.network.base_model.model.get_submodule(module) for module in self.modules]
        return [layer.lora_A[name].weight for layer in layers]

    def penalty(self) -> Tensor:
        """strength * sum |A_i A_t^T| over layers and earlier LoRAs i, a scalar."""
        *earlier, last = [self.reading(name) for name in self.loras]
        overlaps = [(a @ b.T).abs().sum() for lora in earlier for a, b in zip(lora, last, strict=True)]
        return self.strength * torch.stack(overlaps).sum() if overlaps else last[0].new_zeros(())

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.add(name_seed(task.name, self.setup.options.seed))

        def loss_of(rows: Sequence[Row]) -> Tensor:
            return self.model.losses(rows).mean() + self.penalty()

        self.model.fit(task.name, task.rows, self.setup.options, progress, loss_of=loss_of)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return [Answer(text) for text in self.model.answer(rows)]

    def state(self) -> State:
        return {"loras": len(self.loras), "values": {key: value.detach() for key, value in self._values()}}

    def restore(self, state: State) -> None:
        for _ in range(state["loras"]):
            self.add(0)
        self.model.load_state_dict(state["values"], strict=False)

    def _values(self) -> list[tuple[str, Tensor]]:
        """The parameters of all LoRAs and of the head."""
        named = self.model.named_parameters()
        return [(key, value) for key, value in named if ".lora_" in key or key.startswith("head.")]

    @property
    def parameters(self) -> int:
        return sum(value.numel() for _, value in self._values())

    @property
    def kept(self) -> int:
        return sum(value.nbytes for _, value in self._values())
