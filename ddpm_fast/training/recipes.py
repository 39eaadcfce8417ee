"""Networks, processes and options that go together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..data import Dataset, digits, open_dataset
from ..diffusion import GaussianDiffusion
from ..models import UNet
from .config import TrainConfig
from .seeds import derived_seed

# Of TrainConfig, for the digits; the rest are its defaults.
DIGITS_OPTIONS: dict[str, Any] = {
    "num_steps": 2_500,
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "ema_decay": 0.999,
    "checkpoint_every": 500,
}


class Recipe(NamedTuple):
    """What :func:`train` takes first: ``train(*recipe, out=...)``."""

    model: UNet
    diffusion: GaussianDiffusion
    dataset: Dataset
    config: TrainConfig


def digits_recipe(*, diffusion_options: Mapping[str, Any] | None = None, **options: Any) -> Recipe:
    """How the bundled model ``"digits"`` was trained, on the half ``"train"`` of the digits.

    Args:
        diffusion_options: options of :meth:`GaussianDiffusion.from_schedule` to change; a learned
            variance doubles the output channels of the network.
        options: fields of :class:`TrainConfig` to change; with none the recipe is the bundled
            model's own.
    """
    config = TrainConfig(**(DIGITS_OPTIONS | options))
    diffusion = GaussianDiffusion.from_schedule(**(diffusion_options or {}))
    model = seeded_unet(
        config.seed,
        in_channels=1,
        out_channels=_output_channels(1, diffusion),
        image_size=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_resolutions=(4,),
        dropout=0.1,
        num_classes=10,
    )
    return Recipe(model, diffusion, digits("train"), config)


def folder_recipe(
    path: str | os.PathLike[str],
    *,
    image_size: int = 32,
    flip: bool = True,
    class_labels: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    diffusion_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """The paper's CIFAR-10 recipe for your own pictures, fewer levels if they are small.

    Args:
        path: a folder of image files, an npz file or a folder that ``datasets`` saved, see
            :func:`ddpm_fast.data.open_dataset`, also for the next five.
        image_size: height and width to train at.
        flip: mirror half of the pictures.
        class_labels: take the subfolders as classes.
        image_column: the array or column of pictures.
        label_column: the array or column of labels.
        model_options: options of :class:`UNet` to change.
        diffusion_options: as for :func:`digits_recipe`.
        options: fields of :class:`TrainConfig` to change.

    Raises:
        FileNotFoundError, ModuleNotFoundError, NotADirectoryError, ValueError: see
            :func:`ddpm_fast.data.open_dataset` and :class:`UNet`.
    """
    config = TrainConfig(**options)
    diffusion = GaussianDiffusion.from_schedule(**(diffusion_options or {}))
    network: dict[str, Any] = {"in_channels": 3, "dropout": 0.1} | dict(model_options or {})
    dataset = open_dataset(
        path,
        image_size,
        channels=network["in_channels"],
        flip=flip,
        class_labels=class_labels,
        image_column=image_column,
        label_column=label_column,
    )
    levels = min(4, max(1, image_size.bit_length() - 2))  # the smallest at least 4 pixels wide
    sizes = [image_size >> level for level in range(levels)]
    defaults = {
        "image_size": image_size,
        "out_channels": _output_channels(network["in_channels"], diffusion),
        "channel_mult": (1, 2, 2, 2)[:levels],
        "attention_resolutions": [size for size in sizes if 8 < size <= 16],
        "num_classes": dataset.num_classes,
    }
    model = seeded_unet(config.seed, **(defaults | network))
    return Recipe(model, diffusion, dataset, config)


def seeded_unet(seed: int, **options: Any) -> UNet:
    """A new :class:`UNet` whose weights follow from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "weights"))
        return UNet(**options)


def _output_channels(channels: int, diffusion: GaussianDiffusion) -> int:
    return channels * (2 if diffusion.learns_variance else 1)
