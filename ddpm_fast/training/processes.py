"""The processes that train together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")


class PeerFailure(RuntimeError):
    """Another process of the run has failed, and told why."""


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is.

    Attributes:
        rank: from 0; that one writes files and shows progress.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """``device``, or, where processes share a machine's GPUs, the one that is this process's.

        Raises:
            ValueError: it is another process's, or there are fewer GPUs than processes.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= found:
            raise ValueError(f"process {local} of this machine has no GPU of its own among {found}")
        if device.index not in (None, local):
            raise ValueError(f"processes cannot share {device}; ask for cuda, and each has its own")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def averaging(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """While a part's gradient is computed: whether this is the ``now`` to average it."""
        if isinstance(model, DistributedDataParallel) and not now:
            return model.no_sync()
        return nullcontext()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of each process's tensor, on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gathered(self, value: _T) -> list[_T]:
        """Each process's value, on all of them; once there are all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def process_group() -> Iterator[World]:
    """Join the processes that torchrun started; without it, this process is the world.

    A failure within it ends all: the first process that fails raises its own error, the others
    :class:`PeerFailure`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore("processes", store), rank=rank, world_size=size
    )
    try:
        yield World(rank, size)
    except BaseException as error:
        if _is_first_failure(store):
            raise
        raise PeerFailure("another process of this run has failed") from error
    dist.destroy_process_group()


def _is_first_failure(store: Any) -> bool:
    try:
        return bool(store.add("failures", 1) == 1)
    except RuntimeError:  # the process that holds the store has failed and gone
        return False
