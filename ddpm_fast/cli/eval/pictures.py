"""The pictures that are measured: the digits, or what ``ddpm_fast.data`` opens."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ...data import Dataset, digits, open_dataset
from ..options import count

DIGITS = {"digits": "held_out", "digits-train": "train"}
METAVAR = "digits|digits-train|PATH"
HELP = (
    "the digits that the bundled model has not seen, or those it has; a folder of pictures, an "
    ".npz, or a folder that Hugging Face's datasets saved"
)

# Nothing is augmented, so nothing is drawn from it.
_UNUSED = torch.Generator()


def opened(
    data: str, image_size: int | None = None, channels: int | None = None, **columns: Any
) -> Dataset:
    """The pictures that ``data`` names, none of them mirrored.

    Args:
        data: see ``HELP``.
        image_size, channels: of the pictures given out; by default the digits' own, and colour.
        columns: options of :func:`ddpm_fast.data.open_dataset`.

    Raises:
        ValueError: the size is not known, or not that of the digits; and see ``open_dataset``.
    """
    if data in DIGITS:
        if image_size not in (None, 8) or channels not in (None, 1) or any(columns.values()):
            raise ValueError(f"{data}: the digits are grey, of 8x8 pixels, with their own labels")
        return digits(DIGITS[data])  # type: ignore[arg-type]
    if image_size is None:
        raise ValueError(f"{data}: choose the size of its pictures with --image-size")
    return open_dataset(
        data,
        image_size,
        channels=channels or 3,  # type: ignore[arg-type]
        flip=False,
        **columns,
    )


def batch_of(dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pictures [N, C, H, W] in [-1, 1], and their labels if there are any."""
    return dataset.batch(indices, _UNUSED)


def batches_of(dataset: Dataset, size: int) -> list[Tensor]:
    """The indices of all pictures, ``size`` at a time."""
    return list(torch.arange(len(dataset)).split(size))  # type: ignore[no-untyped-call]


def add_size(parser: argparse._ActionsContainer) -> None:
    """``--image-size`` and ``--channels``, of pictures that may have any."""
    parser.add_argument(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help="height and width that pictures are resized to (needed but for the digits)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="1 for grey, 3 for colour (default: 3, but for the digits)",
    )
