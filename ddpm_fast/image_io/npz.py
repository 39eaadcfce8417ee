"""The archive that evaluators of FID read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..atomic import atomic_write
from .pixels import to_uint8


def save_npz(
    images: torch.Tensor,
    path: str | os.PathLike[str],
    *,
    labels: torch.Tensor | Sequence[int] | None = None,
) -> None:
    """Write the samples as OpenAI's evaluators of FID, precision and recall read them.

    ``arr_0`` holds the images, uint8 [N, H, W, C]; ``arr_1`` the labels, int64 [N], if given. The
    same samples give the same bytes: the archive holds no time stamps.

    Args:
        images: [N, C, H, W] in [-1, 1], any number of channels. (The evaluators themselves want
            three.)
        path: The npz file to write; nothing is added to its name.
        labels: The class of each image, [N] integers.

    Raises:
        ValueError: The images are not as above, or N labels were not given.
        OSError: The file cannot be written.
    """
    arrays: list[npt.NDArray[np.generic]] = [to_uint8(images)]
    if labels is not None:
        arrays.append(torch.as_tensor(labels, dtype=torch.int64, device="cpu").numpy())
        if arrays[1].shape != (len(images),):
            raise ValueError(
                f"save_npz: labels must be one per image, [{len(images)}]; "
                f"got the shape {list(arrays[1].shape)}"
            )
    with atomic_write(path) as file:
        np.savez(file, *arrays)  # dates every member 1980-01-01
