"""Processes that learn one task together (data parallel), and a frozen backbone sharded over them (FSDP2).

A launcher (`torchrun`, `accelerate launch`) starts the processes and tells each its rank by the environment. All read
the same rows and draw the same batches; of each batch a process takes its share, and gradients are summed, so that all
make the step that one process alone would make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slm_fast.backbone import Backbone
from slm_fast.errors import InputError, SlmError, WorkError, one_line
from slm_fast.loading import choose_device
from slm_fast.tokenization import Tokenization

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets


class Processes:
    """The processes that learn together: of one that is alone everything is its own share, and nothing passes.

    Attributes:
        rank: of this process, from 0, which is the main one. world_size: how many there are.
    """

    rank, world_size = 0, 1

    def share(self, rows: list[int]) -> tuple[list[int], bool]:
        """Which of a batch's rows are this process's, and whether they count. One that has none passes a row that does
        not, since all processes must pass the backbone as often where it is sharded."""
        mine = rows[self.rank :: self.world_size]
        return (mine, True) if mine else (rows[:1], False)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Let all have the sum over processes of each tensor, in place. All are of one dtype and device."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Let all have the main process's tensors, in place."""


ALONE = Processes()


class ProcessGroup(Processes):
    """The processes that a launcher started, in `torch.distributed`'s default group.

    Raises WorkError from whatever passes between them when another one is no more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        with _named():
            distributed.all_reduce(flat)
        for tensor, found in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(found.view_as(tensor))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            sent = tensor.detach().to(self.device).contiguous()
            with _named():
                distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def gather(self, value: Any) -> list[Any]:
        """What each process has to say, in the order of ranks: anything that JSON holds."""
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        with _named():
            distributed.all_gather(sizes, torch.tensor([len(said)], device=self.device))
            longest = max(map(int, sizes))
            found = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in sizes]
            distributed.all_gather(found, torch.nn.functional.pad(said, (0, longest - len(said))))
        return [json.loads(bytes(data[: int(size)].tolist())) for data, size in zip(found, sizes, strict=True)]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Wait for all at the end of the block. What is wrong in one process is wrong in all: the main one raises the
        first error there was, the others end quietly with its status."""
        mine: SlmError | None = None
        try:
            yield
        except SlmError as error:
            mine = error
        found = self.gather(None if mine is None else [str(mine), mine.status])
        wrong = [(rank, *said) for rank, said in enumerate(found) if said is not None]
        if not wrong:
            return
        rank, message, status = wrong[0]
        if self.rank:
            raise SystemExit(status)
        if mine is not None:
            raise mine
        raise (InputError if status == InputError.status else WorkError)(f"process {rank}: {message}")


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's own are of that kind
        why = one_line(error).partition(". ")[0]
        raise WorkError(f"another process of this run is no more: {why}") from None


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] not in ("", "0", "1")


def asks_for_shards() -> bool:
    """Whether `accelerate launch` was told to shard what does not fit one device: by FSDP, or by DeepSpeed's ZeRO-3,
    which is the same for a backbone that does not learn. ZeRO-1 and ZeRO-2 shard what learns, and that is small."""
    uses_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    zero_3 = uses_zero and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero_3 or os.environ.get("ACCELERATE_USE_FSDP") == "true"


@contextmanager
def process_group(device: str = "auto") -> Iterator[ProcessGroup]:
    """The processes that a launcher started, each with a GPU of its own where `device` is one.

    Raises WorkError where they do not find each other.
    """
    place = choose_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise WorkError(f"processes of this run: do not find each other at {where}: {one_line(error)}") from None
    try:
        yield ProcessGroup(place)
    finally:
        distributed.destroy_process_group()


def shard(backbone: Backbone, group: ProcessGroup) -> None:
    """Spread each of a backbone's layers over all processes (FSDP2); a pass gathers the one that it comes to.

    A GPU then holds its share of all layers, one whole layer, and the embeddings. All processes call this together,
    before the backbone is given to a model, and make all passes together from then on.
    """
    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for layer in backbone.all_layers():
        fully_shard(layer, mesh=mesh)
    backbone.model.to(group.device)
    backbone.tokenization = Tokenization(backbone.tokenizer, backbone.kind, group.device, backbone.vocabulary)
