"""Rivals, one file each: ways to learn a stream of tasks, with the table of them, and `Identifier`s.

These only name the task of a row; `benchmarks/continual/routers.py` has their table. A new rival is a class with the
face of `method.Method` in a file of its own, whose docstring names its source and every departure from it, and a line
of `METHODS`.
"""

from __future__ import annotations

from functools import partial

from benchmarks.continual.methods.ewc import Ewc
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.idbr import Idbr
from benchmarks.continual.methods.joint import Joint
from benchmarks.continual.methods.mbpa import Mbpa
from benchmarks.continual.methods.method import Entry
from benchmarks.continual.methods.olora import OLora
from benchmarks.continual.methods.replay import Replay
from benchmarks.continual.methods.separate import Separate
from benchmarks.continual.methods.slm import Slm

METHODS = {
    "slm": Entry("SLM, trunk + gaussian (the default)", Slm),
    "slm-ti": Entry("SLM, task-ID given", partial(Slm, told=True), told=True),
    "slm-paper": Entry(
        "SLM, sentence + dtkr (as the paper)", partial(Slm, query="sentence", router="dtkr", encoder="minilm")
    ),
    "separate": Entry("Separate LoRA, task-ID given", Separate, told=True),
    "finetune": Entry("Finetune, one model in sequence", Finetune),
    "joint": Entry("Joint, all tasks so far together", Joint),
    "replay": Entry("Replay, 1 % of rows kept", Replay),
    "ewc": Entry("EWC", Ewc),
    "mbpa": Entry("MbPA++, adapted to each row", Mbpa),
    "olora": Entry("O-LoRA", OLora),
    "idbr": Entry("IDBR, 1 % of rows kept", Idbr, kinds=("encoder",)),
}
