"""DTKR + Prompt: what DTKR retrieves is soft prompts, which are read before the text, the best slot's first.

The paper's ablation (SLM, ICLR 2024, Section 4.4 and A.5, with its Eq. 9 and 12): prompts in place of weight
increments, which begin at the embeddings of random tokens. Weights of the route have no part in what is read. What it
shares with all values of DTKR, and where that departs from the paper, is in `dtkr.py`; how a prompt is read, in
`prompts.py`.

The paper gives neither length nor rate: ten vectors a slot, so that 40 are read, and the rates of prompt tuning.
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
