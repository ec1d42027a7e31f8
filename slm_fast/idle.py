"""Prediction options that have no effect where they are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from slm_fast.errors import SlmWarning
from slm_fast.options import PredictOptions

DRAWING = ("temperature", "top_p", "seed")


class IdleOption(SlmWarning):
    """An option of a call has no effect. The command line, which spells options differently, shows its own instead."""


def idle_options(
    options: PredictOptions,
    kind: str,
    *,
    has_heads: bool,
    told: Sequence[str] = (),
    flag: Callable[[str], str] | None = None,
) -> list[str]:
    """A line for each option that changes nothing on a backbone of this kind.

    Args:
        has_heads: whether a known task has a head.
        told: names of the given arguments that tell rows their task.
        flag: how the caller spells an option's name. Default: as in Python.
    """
    name_of, switched_on = (flag, flag) if flag else (str, "{}=True".format)
    idle: dict[str, str] = {}
    if kind == "encoder":
        idle |= dict.fromkeys(
            ("max_new_tokens", "beams", "sample", *DRAWING), "an encoder-only backbone writes no text"
        )
    else:
        labels = () if has_heads else ("head", "top_k")
        idle |= dict.fromkeys(labels, "a backbone that writes its answers weighs no labels")
        if not options.sample:
            idle |= dict.fromkeys(DRAWING, f"it goes with {switched_on('sample')}")
    if options.bare:
        idle |= dict.fromkeys(("abstain", "distance", "head"), f"with {switched_on('bare')} no task answers")
    given = [name for name in idle if getattr(options, name) != getattr(PredictOptions, name)]
    lines = [f"{name_of(name)} has no effect: {idle[name]}" for name in given]
    if options.bare:
        lines += [f"{name_of(name)} has no effect: with {switched_on('bare')} no task answers" for name in told]
        if kind == "encoder":
            empty = "an encoder-only backbone has no answer of its own; every row's is empty"
            lines.insert(0, f"{name_of('bare')}: {empty}")
    return lines


def warn_of_idle_options(options: PredictOptions, kind: str, *, has_heads: bool, told: Sequence[str] = ()) -> None:
    """Warn of a call's idle options, two levels above the caller of this."""
    for line in idle_options(options, kind, has_heads=has_heads, told=told):
        warnings.warn(line, IdleOption, stacklevel=4)
