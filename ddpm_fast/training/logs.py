"""What a run tells of itself: curves and pictures for TensorBoard."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .. import checkpoint
from ..evaluating import evaluating
from ..image_io import save_grid
from ..sampler import sample_progressive
from .learning_rate import learning_rate
from .run import Recent, Run

_GRID = 16  # pictures
_GRID_STEPS = 50  # of DDIM, for each grid


def check_can_log(
    model: checkpoint.Network, log_dir: str | os.PathLike[str] | None, sample_every: int | None
) -> None:
    """Find out before the work is done whether what is asked of a run can be logged.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        ValueError: a model that checkpoints do not know; pictures without a place, below one step
            apart, or that are none.
    """
    if log_dir is not None:
        _summary_writer()
    checkpoint.architecture_of(model)
    if sample_every is None:
        return
    if log_dir is None:
        raise ValueError("sample_every needs a log_dir")
    if sample_every < 1:
        raise ValueError(f"sample_every must be above 0; got {sample_every}")
    channels = model.config()["in_channels"]
    if channels not in (1, 3):
        raise ValueError(
            f"sample_every needs pictures of 1 channel or 3; the model's have {channels}"
        )


class Log:
    """A run's events in a folder, and its grids of samples as PNG files beside them.

    On resuming, what an interrupted run told of later steps is withdrawn.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int) -> None:
        self._folder = Path(folder)
        self._writer = _summary_writer()(str(folder), purge_step=step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    def scalars(self, run: Run, recent: Recent, images_per_s: float) -> None:
        """The means of the steps that have just been looked at."""
        for tag, value in (
            ("loss", recent.loss),
            ("gradient_norm", recent.gradient_norm),
            ("learning_rate", learning_rate(run.step - 1, run.config)),
            ("images_per_s", images_per_s),
        ):
            self._writer.add_scalar(tag, value, run.step)
        self._writer.flush()

    def pictures(self, step: int, images: Tensor, labels: Tensor | None) -> None:
        """A grid of samples, [N, C, H, W] in [-1, 1]."""
        save_grid(images, self._folder / f"samples-{step:07d}.png", labels=labels)
        self._writer.add_images("samples", (images.cpu() + 1) / 2, step)
        self._writer.flush()


def draw_samples(run: Run) -> tuple[Tensor, Tensor | None]:
    """Samples from the averaged weights, the same noise each time, and their labels if any."""
    labels = None if run.num_classes is None else torch.arange(_GRID) % run.num_classes

    def averaged(x_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = functional_call(run.model, run.ema.tensors, (x_t, t), kwargs)
        return output

    with evaluating(run.model):
        steps = sample_progressive(
            averaged,
            (_GRID, *run.image_shape),
            diffusion=run.diffusion,
            sampler="ddim",
            num_steps=min(_GRID_STEPS, run.diffusion.num_timesteps),
            seed=0,
            class_labels=labels,
            device=run.device,
            precision=run.config.precision,
        )
        _, images, _ = deque(steps, maxlen=1).pop()
    return images, labels


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "logs are for TensorBoard, which is not installed: pip install 'ddpm-fast[tensorboard]'"
        ) from error
    return SummaryWriter
