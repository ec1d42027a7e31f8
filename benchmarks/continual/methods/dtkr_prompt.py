"""DTKR + Prompt: DTKR retrieves soft prompts, which are read before the text, the best slot's first.

Source: the paper's ablation (SLM, ICLR 2024, Section 4.4 and A.5, with its Eq. 9 and 12): prompts in place of weight
increments, initialised to the embeddings of random tokens. Route weights are not used. `dtkr.py` describes what all
DTKR values share, and its departures; `prompts.py` describes how a prompt is read.

The paper gives neither length nor learning rate. Here a slot has ten vectors, so that 40 are read, and the rates are
those of prompt tuning.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.continual.methods.common import Classifier, Writer
from benchmarks.continual.methods.dtkr import SLOTS, Dtkr, Query
from benchmarks.continual.methods.method import Setup
from benchmarks.continual.methods.prompts import make_prompted, prompt_options, starting_prompt
from slm_fast.backbone import Backbone

LENGTH = 10


class DtkrPrompt(Dtkr):
    """A `Method`. A slot's value: "prompt", [L, H]."""

    def __init__(self, setup: Setup, *, length: int = LENGTH, query: Query | None = None) -> None:
        backbone = Backbone.load(setup.backbone)
        super().__init__(setup, prompt_options(setup.options, backbone.kind), backbone, query)
        self.length = length

    def new_values(self, seed: int) -> dict[str, Tensor]:
        prompts = starting_prompt(self.backbone, SLOTS * self.length, seed)
        return {"prompt": prompts.view(SLOTS, self.length, -1)}

    def new_model(self, labels: Sequence[str], seed: int) -> Classifier | Writer:
        return make_prompted(self.backbone, self.setup, labels, seed, lambda rows: self.gather("prompt").flatten(1, 2))
