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
        runs, modes = _sampled.get(model) or (0, [(p, p.training) for p in model.modules()])
        _sampled[model] = runs + 1, modes
        _put(modes, training=False)
    try:
        yield
    finally:
        with _lock:
            runs, modes = _sampled.pop(model)
            if runs > 1:
                _sampled[model] = runs - 1, modes
            else:
                _put(modes)


def _put(modes: list[tuple[nn.Module, bool]], *, training: bool | None = None) -> None:
    """All parts into one mode, or each into its own."""
    for part, own in modes:
        mode = own if training is None else training
        if part.training != mode:  # to set an attribute of a module takes a while
            part.training = mode
