"""CUDA graphs: a few steps captured once and replayed, with next to nothing left for the host."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch


def capture(steps: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The graph of what ``steps`` does on the current device; nothing of it is executed yet.

    None, with a warning that names the cause, where the work cannot be captured: the network
    waits for the device, say, by reading a number back.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may go on using their devices meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            steps()
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        warnings.warn(
            f"ddpm_fast samples without a CUDA graph, as the network cannot be captured: {cause}",
            stacklevel=2,
        )
        return None
    return graph


@contextlib.contextmanager
def beside_the_current_stream(device: torch.device) -> Iterator[None]:
    """A stream for the first runs of what is to be captured: libraries set themselves up there."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
