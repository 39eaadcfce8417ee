"""The moving average of the weights, which samples are drawn with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import TrainConfig


def ema_decay(step: int, ceiling: float) -> float:
    """The decay of the averaged weights in a step: (1 + s) / (10 + s), at most ``ceiling``.

    Early weights are soon forgotten, so short runs have a useful average too.
    """
    return min(ceiling, (1 + step) / (10 + step))


def decay_ceiling(config: TrainConfig) -> float:
    """The decay per step that the warm-up ends at."""
    if config.ema_half_life is None:
        return config.ema_decay
    return float(0.5 ** (config.batch_size / config.ema_half_life))


class AveragedWeights:
    """The exponential moving average of all that a model's ``state_dict`` holds.

    Attributes:
        tensors: the averages, by name.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self._ceiling = decay_ceiling(config)
        self._weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.tensors = {name: tensor.clone() for name, tensor in self._weights.items()}

    def update(self, step: int) -> None:
        """Take in the weights of the model after ``step``."""
        decay = ema_decay(step, self._ceiling)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.tensors.values()), list(self._weights.values()), step)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over averages of the same names."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
