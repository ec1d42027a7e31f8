"""Data-parallel learning of one task in several processes, with the frozen backbone optionally sharded (FSDP2).

A launcher (`torchrun`, `accelerate launch`) starts the processes and sets their ranks in the environment. All read the
same rows and draw the same batches. Each takes its share of every batch, and gradients are summed, so that all make the
step that a single process would make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from slm_fast.backbone import Backbone
from slm_fast.errors import InputError, SlmError, WorkError, one_line
from slm_fast.loading import choose_device
from slm_fast.tokenization import Tokenization

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by every launcher


class Processes:
    """The processes that learn together. This base class is a single process: its share is everything, and it
    communicates with no other.

    Attributes:
        rank: rank of this process. The main process has rank 0.
        world_size: number of processes.
    """

    rank, world_size = 0, 1

    def share(self, rows: list[int]) -> tuple[list[int], bool]:
        """This process's rows of a batch, and whether they count. A process without any gets a row that does not count,
        since all must make the same number of passes through a sharded backbone."""
        mine = rows[self.rank :: self.world_size]
        return (mine, True) if mine else (rows[:1], False)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place. All tensors have the same dtype and device."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the main process's tensors to all processes, in place."""


ALONE = Processes()


class ProcessGroup(Processes):
    """The processes that a launcher started, as `torch.distributed`'s default group.

    All communication raises WorkError if another process has ended.
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
        """Collect a value from each process, in the order of ranks. Values may be anything that JSON supports."""
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
        """Wait for all processes at the end of the block. If any raised an error, all fail: the main process raises the
        one of the lowest rank, and the others exit silently with its status."""
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
    except RuntimeError as error:  # includes torch.distributed's errors
        why = one_line(error).partition(". ")[0]
        raise WorkError(f"another process of this run is no more: {why}") from None


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] not in ("", "0", "1")


def asks_for_shards() -> bool:
    """Whether `accelerate launch` was told to shard the model: by FSDP, or by DeepSpeed's ZeRO-3, which is the same for
    a frozen backbone. ZeRO-1 and ZeRO-2 only shard the training state of trained weights, which are small here."""
    uses_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    zero_3 = uses_zero and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero_3 or os.environ.get("ACCELERATE_USE_FSDP") == "true"


@contextmanager
def process_group(device: str = "auto") -> Iterator[ProcessGroup]:
    """Connect the processes that a launcher started, each with its own GPU if `device` is a GPU.

    Raises WorkError if they cannot reach each other.
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
    """Shard each layer of a backbone over all processes (FSDP2). A pass gathers one layer at a time.

    Each GPU then holds its share of all layers, one whole layer, and the embeddings. All processes must call this
    together, before the backbone is given to a model, and make all passes together from then on.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for layer in backbone.all_layers():
        fully_shard(layer, mesh=mesh)
    backbone.model.to(group.device)
    backbone.tokenization = Tokenization(backbone.tokenizer, backbone.kind, group.device, backbone.vocabulary)
