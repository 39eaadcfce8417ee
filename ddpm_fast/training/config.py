"""The options of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..losses import LOSSES

LR_SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16")

# What every checkpoint tells. Newer options are told where they are not the default, so that a run
# without them writes what it always has, and an old checkpoint reads as a run without them.
_ALWAYS_TOLD = (
    "num_steps",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "grad_clip",
    "ema_decay",
    "label_dropout",
    "seed",
    "checkpoint_every",
)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run; the defaults are the paper's for CIFAR-10 (appendix B).

    Attributes:
        num_steps: optimizer steps in the whole run.
        batch_size: pictures per step, over all processes.
        learning_rate: Adam's, after warm-up.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        grad_clip: largest norm of the gradient.
        ema_decay: decay per step of the averaged weights, approached from below by a warm-up:
            step s uses at most (1 + s) / (10 + s).
        label_dropout: share of labels replaced by the null label, for classifier-free guidance
            (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).
        seed: of everything random.
        checkpoint_every: steps between two checkpoints.
        lr_schedule: ``constant`` after warm-up, or ``cosine``, half a cosine that would reach zero
            in the step after the last.
        ema_half_life: instead of ``ema_decay``: pictures after which the share of a weight in the
            average has halved (Karras et al. 2022, arXiv 2206.00364, appendix F.2: 500,000 for
            CIFAR-10), whatever the batch. The warm-up is the same.
        loss: of each element: ``mse``, ``l1`` or ``huber``; see
            :meth:`GaussianDiffusion.training_losses`, also for the next two.
        min_snr_gamma: weigh timesteps by min-SNR (Hang et al. 2023); 5 in the paper.
        offset_noise: strength of the noise that all pixels of a channel share; often 0.1.
        accumulate: parts of a batch, computed one after the other, to need less memory. Flips and
            the network's dropout are drawn for each part.
        precision: the network's: ``fp32``, or ``bf16`` for autocast; the weights stay float32.

    Raises:
        ValueError: a value is out of range.
    """

    num_steps: int = 800_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 5_000
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 5_000
    lr_schedule: str = "constant"
    ema_half_life: float | None = None
    loss: str = "mse"
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        positive = ("num_steps", "batch_size", "learning_rate", "grad_clip", "checkpoint_every")
        for name in (*positive, "ema_half_life", "min_snr_gamma", "accumulate"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "above 0")
        for name in ("warmup_steps", "seed", "offset_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"TrainConfig: {name} must not be negative; got {getattr(self, name)}"
                )
        for name in ("ema_decay", "label_dropout"):
            self._require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        known = {"lr_schedule": LR_SCHEDULES, "loss": tuple(LOSSES), "precision": PRECISIONS}
        for name, values in known.items():
            self._require(getattr(self, name) in values, name, f"one of {', '.join(values)}")

    def description(self) -> dict[str, Any]:
        """What a checkpoint tells of the options, for :meth:`from_description`."""
        defaults = TrainConfig()
        return {
            name: value
            for name, value in asdict(self).items()
            if name in _ALWAYS_TOLD or value != getattr(defaults, name)
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> TrainConfig:
        """The options that a checkpoint's description has; what it has not has its default."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: description[name] for name in names if name in description})

    def may_change_on_resume(self, name: str) -> bool:
        """Whether a run with another value of the option ``name`` is the same run.

        It is up to rounding, and with another ``accumulate`` up to the network's dropout and the
        flips, which are drawn for each part.
        """
        if name == "num_steps":
            return self.lr_schedule == "constant"
        return name in ("checkpoint_every", "accumulate")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"TrainConfig: {name} must be {what}; got {getattr(self, name)}")
