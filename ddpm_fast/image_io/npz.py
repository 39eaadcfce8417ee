"""The archive that evaluators of FID read."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from typing import IO

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
    pixels, classes = to_uint8(images), None
    if labels is not None:
        classes = torch.as_tensor(labels, dtype=torch.int64, device="cpu").numpy()
        if classes.shape != (len(images),):
            raise ValueError(
                f"save_npz: labels must be one per image, [{len(images)}]; "
                f"got the shape {list(classes.shape)}"
            )
    with atomic_write(path) as file:
        write_npz(file, [pixels], len(images), classes)


def write_npz(
    file: IO[bytes],
    parts: Iterable[npt.NDArray[np.uint8]],
    count: int,
    labels: npt.NDArray[np.int64] | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Write the bytes of ``np.savez(file, images, labels)``, one part of the images at a time.

    Args:
        file: open for writing.
        parts: uint8 [n, H, W, C], one at least; each is asked for when the last one is written.
        count: the number N of images in all parts together.
        labels: the class of each image, [N].

    Returns:
        The shape of all images together.
    """
    shape: tuple[int, ...] = ()
    # It dates every member 1980-01-01.
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for part in parts:
                if not shape:
                    shape = (count, *part.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(part).data)
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))
    return shape
