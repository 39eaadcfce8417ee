"""Too little memory, told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def out_of_memory_as(sentence: str) -> Iterator[None]:
    """Make ValueErrors, which say the ``sentence``, of what a device without memory raises."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(sentence) from None
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory; the CPU is known by the allocator that it names."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
