"""Eval mode for a model while it is sampled from, however many runs share it."""

from __future__ import annotations

import threading

from torch import nn

# The models that are sampled from now, by their id: how many runs, and the parts that were found
# in training mode.
_sampled: dict[int, tuple[int, list[nn.Module]]] = {}
_lock = threading.Lock()


class evaluating:
    """Eval mode for all of the model; the last of the runs that share it puts each part back."""

    def __init__(self, model: object) -> None:
        self.model = model if isinstance(model, nn.Module) else None

    def __enter__(self) -> None:
        if self.model is None:
            return
        with _lock:
            runs, trained = _sampled.get(id(self.model), (0, []))
            found = [part for part in self.model.modules() if part.training]
            for part in found:
                part.training = False
            _sampled[id(self.model)] = runs + 1, trained + found

    def __exit__(self, *error: object) -> None:
        if self.model is None:
            return
        with _lock:
            runs, trained = _sampled.pop(id(self.model))
            if runs > 1:
                _sampled[id(self.model)] = runs - 1, trained
                return
            for part in trained:
                part.training = True
