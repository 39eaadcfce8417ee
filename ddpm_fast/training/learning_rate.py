"""The learning rate of each step."""

from __future__ import annotations

import math

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0 ... num_steps - 1: a linear warm-up, then constant or half a cosine down to 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant" or step < config.warmup_steps:
        return rate
    done = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return rate * 0.5 * (1 + math.cos(math.pi * done))
