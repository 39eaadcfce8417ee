"""Eval mode for a model while it is sampled from, however many runs share it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

# The models that are sampled from now: by how many runs, and the modes of their parts before.
_sampled: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]]
_sampled = WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Eval mode for all of the model; the last of the runs that share it puts each part back."""
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        runs, modes = _sampled.get(model, (0, [(part, part.training) for part in model.modules()]))
        _sampled[model] = runs + 1, modes
        for part, _ in modes:
            part.training = False
    try:
        yield
    finally:
        with _lock:
            runs, modes = _sampled.pop(model)
            if runs > 1:
                _sampled[model] = runs - 1, modes
            else:
                for part, mode in modes:
                    part.training = mode
