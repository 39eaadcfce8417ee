"""The processes that share a piece of work: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# A process waits for the others for as long as they work. That one of them died it learns at once,
# by the connection, and not by the clock.
_PATIENCE = timedelta(days=7)


class OtherProcessError(RuntimeError):
    """Ends a process because another one failed, and says which and why."""


def launched() -> bool:
    """Whether torchrun, or a launcher that sets what torchrun sets, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks(*, of_machine: bool = False) -> bool:
    """Whether this process tells what concerns all of them, or all of its machine."""
    return os.environ.get("LOCAL_RANK" if of_machine else "RANK", "0") == "0"


def local_device() -> torch.device:
    """The device of this process: its own GPU of this machine, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def sentence(error: BaseException) -> str:
    """An error in one line; one of the system begins with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:  # raised by the system, not by this package
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@dataclass(frozen=True)
class Processes:
    """What one of the processes knows of them all.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; each must call this.

        Raises:
            OtherProcessError: one of them has ended.
        """
        values = [value] * self.count
        if self.count > 1:
            try:
                dist.all_gather_object(values, value)
            except RuntimeError:
                raise OtherProcessError("another process has ended") from None
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave together, with an error if one of them had one.

        The one that failed raises its own error, the others that of the first that failed.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else sentence(failure))
        if failure is not None:
            raise failure
        for rank, reason in enumerate(failures):
            if reason is not None:
                raise OtherProcessError(f"process {rank}: {reason}")


@contextmanager
def processes() -> Iterator[Processes]:
    """All processes: those of the default group, which is made of torchrun's where there is none.

    PyTorch's choice of backends is left to it: gloo, and beside it nccl where there are GPUs.
    """
    if not dist.is_available() or not (dist.is_initialized() or launched()):
        yield Processes()
    elif dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
    else:
        dist.init_process_group(timeout=_PATIENCE)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
