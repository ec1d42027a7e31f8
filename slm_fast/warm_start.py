"""Warm start: a task's values initialised from the slots of a learned task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError, some_of
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route
from slm_fast.options import LearnOptions
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask


@dataclass(frozen=True)
class Start:
    """The task that another one's values start from.

    Attributes:
        weights: [N, S] float64, of its slots for each training row.
    """

    task: LearnedTask
    weights: Tensor

    @torch.no_grad()
    def fill(self, values: Mapping[str, tuple[Tensor, Tensor]], own: Tensor) -> None:
        """Initialise new values: each new slot from the slot with the largest weight on the new slot's rows.

        From a larger rank the nearest increments of the new rank are taken. From a smaller rank all are taken, and the
        remaining rows do not change.

        Args:
            values: module name -> (lora_a [S, r, I], lora_b [S, r, O]), changed in place.
            own: [N, S] float64, weight of each new slot for each training row.
        """
        slots = self.slots_for(own)
        for module, pair in values.items():
            rank = pair[0].shape[1]
            theirs = self.task.values[module][0][slots], self.task.values[module][1][slots]
            if theirs[0].shape[1] > rank:
                theirs = nearest_of_rank(*theirs, rank)
            for new, old in zip(pair, theirs, strict=True):
                new[:, : old.shape[1]] = old.to(new)

    def slots_for(self, own: Tensor) -> Tensor:
        """The slot from which each new one starts, [S] int64. own: [N, S], as for `fill`."""
        own = torch.where(own.sum(0) > 0, own, 1.0)  # a slot without rows uses all of them
        return (own.T @ self.weights).argmax(1)


def nearest_of_rank(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Reduce the rank of slots: [S, r, I] and [S, r, O] -> [S, rank, I] and [S, rank, O], with the nearest products
    lora_a' lora_b of that rank (Eckart & Young 1936) and equal norms of both halves. A layer narrower than `rank` has
    as many rows as it is wide. float32, computed in float64."""
    left, upper_a = torch.linalg.qr(lora_a.double().mT)  # [S, I, r], [S, r, r] for a layer wider than r
    right, upper_b = torch.linalg.qr(lora_b.double().mT)
    u, s, v = torch.linalg.svd(upper_a @ upper_b.mT, full_matrices=False)
    root = s[:, :rank].sqrt()[:, None]  # [S, 1, rank]
    short_a, short_b = left @ (u[:, :, :rank] * root), right @ (v.mT[:, :, :rank] * root)
    return short_a.mT.float(), short_b.mT.float()


def check_start(model: AdaptedModel, task: str, options: LearnOptions) -> None:
    """Raise InputError if a task is to start from one that is not learned."""
    others = [known.name for known in model.pool.tasks if known.name != task and known.adapter is None]
    if isinstance(options.warm_start, str) and options.warm_start not in others:
        raise InputError(f"warm_start: task {options.warm_start!r} is not learned; tasks: {some_of(others)}")


@torch.no_grad()
def find_start(model: AdaptedModel, task: str, options: LearnOptions, query: Tensor) -> Start | None:
    """The task to start from: the one named, or the one to which most of the training queries [N, D] are routed now
    (the first by name if several). None if no start is wanted or no other task is learned.

    Raises:
        InputError: the named task is not learned.
    """
    check_start(model, task, options)
    pool, router = model.pool, model.router
    # Imported tasks have their own layers and ranks.
    possible = [known.name != task and known.adapter is None for known in pool.tasks]
    others = torch.tensor(possible, dtype=torch.bool, device=query.device)[pool.slot_task]
    if not options.warm_start or not others.any():
        return None
    name = options.warm_start
    if not isinstance(name, str):
        route = router.route(query, others)
        owner = pool.slot_task[route.slot_ids.clamp(min=0)]  # [N, K]
        shared = ((owner[:, :, None] == owner[:, None]) * route.weights[:, None]).sum(2)  # p(t) of each slot's task
        found = owner.gather(1, shared.argmax(1, keepdim=True)).cpu()
        name = pool.names[int(found.flatten().bincount().argmax())]
    allowed = pool.slots_of(name)
    route = router.route(query, allowed)
    first, known = int(allowed.nonzero()[0]), pool.tasks[pool.names.index(name)]
    route = Route(torch.where(route.slot_ids < 0, -1, route.slot_ids - first), route.weights)
    return Start(known, slot_weights(route, known.slots))


def slot_weights(route: Route, slots: int) -> Tensor:
    """Weight of each of the slots 0..slots-1 in each row of a route: [N, slots] float64, on the CPU."""
    ids, weights = route.slot_ids.cpu(), route.weights.cpu().double()
    inside = (ids >= 0) & (ids < slots)
    found = torch.zeros(len(ids), slots, dtype=torch.float64)
    return found.scatter_add_(1, ids.where(inside, 0), weights * inside)


def kept_options(options: LearnOptions, start: Start | None, patience: int | None = None) -> dict[str, Any]:
    """Options in the form of a task's file. `warm_start` is present only if wanted:
    {"task": name, "sha256": of its file}, or True if there was nothing to start from. `patience` is present only if
    set."""
    kept = asdict(options) | ({} if patience is None else {"patience": patience})
    if not options.warm_start:
        del kept["warm_start"]
    elif start is not None:
        kept["warm_start"] = {"task": start.task.name, "sha256": digest_of(start.task)}
    return kept


def is_wanted(options: LearnOptions, kept: Mapping[str, Any]) -> bool:
    """Whether these options ask for the start recorded in a task's file."""
    start = kept.get("warm_start", False)
    if isinstance(options.warm_start, str):
        return isinstance(start, Mapping) and start["task"] == options.warm_start
    return bool(start) == options.warm_start
