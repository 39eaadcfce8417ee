"""CUDA graphs: a few steps captured once and replayed, with next to nothing left for the host."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Graph(NamedTuple):
    """Captured work, and the stream on which it was captured."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream

    def replay(self) -> None:
        """Queues the work on the current stream."""
        self.graph.replay()


def capture(steps: Callable[[], object], beside: Graph | None = None) -> Graph | None:
    """The graph of what ``steps`` does on the current device; nothing of it is executed yet.

    It works in the memory of the graph ``beside``, if there is one, with which it takes turns.

    None, with a warning that names the cause, where the work cannot be captured: the network
    waits for the device, say, by reading a number back.
    """
    before = torch.cuda.current_stream()
    # torch's own choice is one stream for all devices.
    stream = torch.cuda.Stream() if beside is None else beside.stream  # type: ignore[no-untyped-call]
    graph, pool = torch.cuda.CUDAGraph(), None if beside is None else beside.graph.pool()
    failures: list[BaseException] = []

    def recorded() -> None:
        try:
            steps()
        except BaseException as error:
            failures.append(error)
            raise

    try:
        # Other threads may go on using their devices meanwhile.
        with (
            _no_word_of_an_empty_graph(),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            recorded()
    except RuntimeError as error:
        _recover(graph, before)
        first = failures[0] if failures else error  # the end of a capture that failed fails, too
        if not isinstance(first, RuntimeError):
            raise first from None
        cause = (str(first).strip() or type(first).__name__).splitlines()[0]
        warnings.warn(
            f"ddpm_fast samples without a CUDA graph, as the network cannot be captured: {cause}",
            stacklevel=2,
        )
        return None
    return Graph(graph, stream)


@contextlib.contextmanager
def _no_word_of_an_empty_graph() -> Iterator[None]:
    """Of work that failed before its first kernel; the error itself says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
        yield


_abandoned: list[torch.cuda.CUDAGraph] = []


def _recover(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Undoes what torch leaves behind when a capture cannot be ended.

    That is the capture's stream, still the current one, and a generator that refuses to draw
    outside of a capture, until one has ended well.
    """
    _abandoned.append(graph)  # torch's allocator goes on asking it whose turn it is
    torch.cuda.set_stream(stream)
    numbers = torch.empty(1, device=stream.device)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(torch.cuda.CUDAGraph(), None, side, capture_error_mode="thread_local"):
        numbers.zero_()


@contextlib.contextmanager
def beside_the_current_stream(device: torch.device) -> Iterator[None]:
    """A stream for the first runs of what is to be captured: libraries set themselves up there."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
