"""CUDA graphs: a few steps captured once and replayed, with next to nothing left for the host."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


def capture(
    steps: Callable[[], object], beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph | None:
    """The graph of what ``steps`` does on the current device; nothing of it is executed yet.

    It works in the memory of the graph ``beside``, if there is one, with which it takes turns.

    None, with a warning that names the cause, where the work cannot be captured: the network
    waits for the device, say, by reading a number back.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        _capture_into(graph, steps, None if beside is None else beside.pool())
    except RuntimeError as error:
        _recover(stream)
        # torch ends the capture before the error arrives here, and may fail at that, too.
        first = error.__context__ or error
        cause = str(first).strip().splitlines()[0]
        warnings.warn(
            f"ddpm_fast samples without a CUDA graph, as the network cannot be captured: {cause}",
            stacklevel=2,
        )
        return None
    return graph


def _capture_into(
    graph: torch.cuda.CUDAGraph, work: Callable[[], object], pool: Any = None
) -> None:
    with warnings.catch_warnings():
        # Of work that failed before its first kernel; the error itself says more.
        warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
        # Other threads may go on using their devices meanwhile.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            work()


def _recover(stream: torch.cuda.Stream) -> None:
    """Undoes what torch leaves behind when a capture cannot be ended.

    That is the capture's stream, still the current one, and a generator that refuses to draw
    outside of a capture, until one has ended well.
    """
    torch.cuda.set_stream(stream)
    numbers = torch.empty(1, device=stream.device)
    _capture_into(torch.cuda.CUDAGraph(), numbers.zero_)


@contextlib.contextmanager
def beside_the_current_stream(device: torch.device) -> Iterator[None]:
    """A stream for the first runs of what is to be captured: libraries set themselves up there."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
