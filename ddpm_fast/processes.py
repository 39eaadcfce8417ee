"""The processes that share a piece of work: those that torchrun started, or this one alone."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

if dist.is_available():
    # Before there is a group: one that is there already it would keep for ever, and the threads of
    # a group that lives on can abort a process at its end.
    import torch.distributed.nn.functional

_T = TypeVar("_T")

# A process waits for the others for as long as they work. That one of them died it learns at once,
# by the connection, and not by the clock.
_PATIENCE = timedelta(days=7)

_groups = itertools.count()


class OtherProcessError(RuntimeError):
    """Ends a process because another one failed, which raises the error that tells why."""


@dataclass(frozen=True)
class Processes:
    """What one of the processes knows of them all.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes what they have in common, and shows progress."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """The ``value`` of every process, by rank; each must call this.

        Raises:
            ConnectionError: one of them has ended, or can no longer be reached.
        """
        values = [value] * self.count
        if self.count > 1:
            with _connected():
                dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave together, with an error if one of them had one.

        The one that failed raises its own error, the others that of the first that failed.

        Raises:
            OtherProcessError: another process has failed; it gives its rank and its error.
            ConnectionError: another process has ended, or can no longer be reached.
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

    An error that leaves the block ends all processes of torchrun's: the first that fails raises its
    own, the others, whatever befalls them, an :class:`OtherProcessError`. So one tells why; one of
    each machine, where those that are left have lost torchrun's store too.

    Raises:
        ConnectionError: one of them has ended, or can no longer be reached.
    """
    if dist.is_available() and dist.is_initialized():
        with _connected():
            yield Processes(dist.get_rank(), dist.get_world_size())
    elif dist.is_available() and launched() and os.environ["WORLD_SIZE"] != "1":
        with _torchrun_group() as group:
            yield group
    else:
        yield Processes()


@contextmanager
def _torchrun_group() -> Iterator[Processes]:
    """A group that lasts as long as the block; after a failure, as long as the process.

    PyTorch's choice of backends is left to it: gloo, and beside it nccl where there are GPUs.
    """
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    # torchrun's store outlives a group, whose addresses are not those of the next one.
    store = PrefixStore(f"group/{next(_groups)}", store)
    dist.init_process_group(store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        with _connected():
            yield Processes(rank, count)
    except OtherProcessError:
        _let_go()
        raise
    except BaseException as error:
        is_success = isinstance(error, SystemExit) and not error.code  # as of --help
        tells = is_success or _is_first_failure(error, store)
        _let_go()
        if tells:
            raise
        raise OtherProcessError("another process has failed") from error
    dist.destroy_process_group()


def _let_go() -> None:
    """Leave a thread of PyTorch's the time to throw away what was exchanged last.

    It needs the interpreter for that, and where this has ended meanwhile it aborts the process. A
    group that is destroyed waits for its threads, but after a failure might wait for ever.
    """
    time.sleep(0.1)


@contextmanager
def _connected() -> Iterator[None]:
    """A block that ends in a ConnectionError where PyTorch, whatever it does, loses a process."""
    try:
        yield
    except RuntimeError as error:
        # An error of gloo's has no class of its own, but tells where in its source it was raised.
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise ConnectionError("the connection to another process was lost") from error
        raise


def _is_first_failure(error: BaseException, store: Any) -> bool:
    try:
        return bool(store.add("failures", 1) == 1)
    except RuntimeError:  # the process, or the machine, that holds the store has gone
        return isinstance(error, ConnectionError) and first_of_machine()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets what torchrun sets, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first_of_machine() -> bool:
    """Whether this process is the one that tells what concerns its whole machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def local_device(device: torch.device | str | None = None) -> torch.device:
    """The device of this process, and of no other on its machine if it is a GPU.

    Where a launcher started several processes, each has the GPU of its ``LOCAL_RANK``, which
    becomes the current one.

    Args:
        device: what was asked for; by default ``cuda`` if there is a GPU, else ``cpu``.

    Raises:
        ValueError: it is another process's, or there are fewer GPUs than processes.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    local, count = os.environ.get("LOCAL_RANK"), int(os.environ.get("WORLD_SIZE", "1"))
    if device.type != "cuda" or local is None or count == 1:
        return device
    own, found = torch.device("cuda", int(local)), torch.cuda.device_count()
    if int(local) >= found:
        raise ValueError(f"process {local} of this machine has no GPU of its own among {found}")
    if device.index is not None and device != own:
        raise ValueError(f"processes cannot share {device}; ask for cuda, and each has its own")
    torch.cuda.set_device(own)
    return own


def sentence(error: BaseException) -> str:
    """An ``error`` in one line; one of the system begins with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:  # raised by the system, not by this package
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
