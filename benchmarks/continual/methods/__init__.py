"""Rivals, one file each: methods that learn a stream (`METHODS`), and `Identifier`s, which only name a row's task.

`benchmarks/continual/routers.py` has the table of identifiers. To add a method, implement `method.Method` in a file of
its own, whose docstring names its source and every departure from it, and add a line to `METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from benchmarks.continual.methods.dtkr_adapter import DtkrAdapter
from benchmarks.continual.methods.dtkr_prompt import DtkrPrompt
from benchmarks.continual.methods.ewc import Ewc
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.idbr import Idbr
from benchmarks.continual.methods.joint import Joint
from benchmarks.continual.methods.lfpt5 import Lfpt5
from benchmarks.continual.methods.mbpa import Mbpa
from benchmarks.continual.methods.method import Entry, Method, Setup
from benchmarks.continual.methods.olora import OLora
from benchmarks.continual.methods.progressive_prompts import ProgressivePrompts
from benchmarks.continual.methods.prompt_tuning import PromptTuning
from benchmarks.continual.methods.replay import Replay
from benchmarks.continual.methods.separate import Separate
from benchmarks.continual.methods.slm import PAPER_CONFIG, PAPER_OPTIONS, Slm
from slm_fast import InputError
from slm_fast.options import LearnOptions, ModelConfig

METHODS = {
    "slm": Entry("slm_fast", Slm),
    "slm-ti": Entry("slm_fast, oracle", partial(Slm, told=True), told=True),
    "slm-paper": Entry("SLM as in the paper", partial(Slm, **PAPER_CONFIG), options=PAPER_OPTIONS),
    "separate": Entry("Separate, one LoRA per task, oracle", Separate, told=True),
    "joint": Entry("Joint training on all tasks so far", Joint, retrains=True),
    "finetune": Entry("Sequential finetuning", Finetune),
    "replay": Entry("Replay, 1 % of rows", Replay),
    "ewc": Entry("EWC", Ewc),
    "mbpa": Entry("MbPA++", Mbpa),
    "idbr": Entry("IDBR, 1 % of rows", Idbr, ("encoder",)),
    "olora": Entry("O-LoRA", OLora),
    "prompt": Entry("Sequential prompt tuning", PromptTuning),
    "progressive": Entry("Progressive Prompts, oracle", ProgressivePrompts, told=True),
    "lfpt5": Entry("LFPT5", Lfpt5, ("seq2seq",)),
    "dtkr-prompt": Entry("DTKR + Prompt", DtkrPrompt),
    "dtkr-adapter": Entry("DTKR + Adapter", DtkrAdapter, ("encoder", "causal")),
}

LISTS = ("targets", "taps")  # options with several values


def method_of(spec: str) -> tuple[Entry, Callable[[Setup], Method]]:
    """The entry and the constructor of a method such as "finetune" or "slm-paper:k=2,rank=4".

    Options after the colon are fields of LearnOptions, keywords of the method's class or, for slm_fast, fields of
    ModelConfig. Several targets or taps are joined with "+".

    Raises InputError for an unknown name or option.
    """
    name, _, given = spec.partition(":")
    if name not in METHODS:
        raise InputError(f"method {name!r}: not known; methods: {', '.join(METHODS)}")
    entry = METHODS[name]
    config: dict[str, Any] = {}
    learning: dict[str, Any] = {}
    keywords = inspect.signature(entry.make).parameters.values()
    own = {keyword.name for keyword in keywords if keyword.kind is keyword.KEYWORD_ONLY} - {"told"}
    if any(keyword.kind is keyword.VAR_KEYWORD for keyword in keywords):
        own |= {field.name for field in fields(ModelConfig)}
    for part in filter(None, given.split(",")):
        option, equals, value = part.partition("=")
        if equals and option in own:
            config[option] = _values(value) if option in LISTS else _value(value)
        elif equals and option in {field.name for field in fields(LearnOptions)} - {"autocast"}:  # is the RUN's
            learning[option] = _value(value)
        else:
            raise InputError(f"method {spec!r}: {part!r} is no option of it, as k=2 or rank=4 may be")

    def make(setup: Setup) -> Method:
        return entry.make(replace(setup, options=replace(setup.options, **{**entry.options, **learning})), **config)

    return entry, make


def _values(text: str) -> tuple[object, ...] | None:
    return None if text.lower() == "none" else tuple(_value(part) for part in text.split("+"))


def _value(text: str) -> object:
    """A number, a boolean, None or a string."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
