"""PNGs: a grid, a film strip, and one file per image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..atomic import atomic_write
from .painting import as_texts, check_at_least_1, paint, readable_scale
from .pixels import frames_of, pictures_of


def save_grid(
    images: torch.Tensor,
    path: str | os.PathLike[str],
    *,
    labels: Iterable[object] | None = None,
    columns: int | None = None,
    scale: int | None = None,
) -> None:
    """Write one PNG that shows all images, row by row, on white paper.

    Args:
        images: [N, C, H, W] in [-1, 1] with N > 0 and C = 1 (grey) or 3 (RGB).
        path: The PNG file to write.
        labels: What to write under each image, N of anything that ``str`` reads well; or a tensor
            [N]. None leaves the labels and the room for them out.
        columns: Images in a row; by default the grid is as near to a square as N allows.
        scale: Each pixel becomes a square of ``scale`` by ``scale``, with no smoothing; by
            default images whose longer side is below 64 pixels are magnified to at least that.

    Raises:
        ValueError: The images are not as above, N labels were not given, or ``columns`` or
            ``scale`` is below 1.
        OSError: The file cannot be written.
    """
    pictures = pictures_of(images, "save_grid")
    texts = as_texts(labels, len(images), "save_grid: labels must be one per image")
    if not pictures:
        raise ValueError("save_grid: images must hold at least one image")
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    if scale is None:
        scale = readable_scale(pictures[0])
    check_at_least_1("save_grid", columns=columns, scale=scale)
    with atomic_write(path) as file:
        paint(pictures, columns, scale, labels=texts).save(file, format="PNG")


def save_strip(
    frames: torch.Tensor | Sequence[torch.Tensor],
    path: str | os.PathLike[str],
    *,
    captions: Iterable[object] | None = None,
    labels: Iterable[object] | None = None,
    scale: int | None = None,
) -> None:
    """Write one PNG that shows how samples came about: a row per sample, a column per moment.

    Args:
        frames: K moments of N samples, [K, N, C, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB), or
            a sequence of [N, C, H, W]; such as the ``x_t`` or the ``pred_xstart`` of
            :class:`ddpm_fast.Intermediates`.
        path: The PNG file to write.
        captions: What to write above each column, K of anything that ``str`` reads well; or a
            tensor [K]. None leaves them and the room for them out.
        labels: What to write to the left of each row, N of the like.
        scale: As for :func:`save_grid`.

    Raises:
        ValueError: The frames are not as above or hold nothing, not as many captions or labels
            were given, or ``scale`` is below 1.
        OSError: The file cannot be written.
    """
    moments = frames_of(frames, "save_strip")
    rows = list(zip(*moments, strict=True))
    heads = as_texts(captions, len(moments), "save_strip: captions must be one per frame")
    sides = as_texts(labels, len(rows), "save_strip: labels must be one per sample")
    if scale is None:
        scale = readable_scale(rows[0][0])
    check_at_least_1("save_strip", scale=scale)
    pictures = [picture for row in rows for picture in row]
    strip = paint(pictures, len(moments), scale, row_labels=sides, column_captions=heads)
    with atomic_write(path) as file:
        strip.save(file, format="PNG")


def save_images(
    images: torch.Tensor, folder: str | os.PathLike[str], *, first_index: int = 0
) -> list[Path]:
    """Write one PNG per image, named by the index of the sample: ``000017.png``.

    Args:
        images: [N, C, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB).
        folder: Where to write; made if it is missing.
        first_index: The index of ``images[0]`` in the whole run, which names its file.

    Returns:
        The paths of the N files, in order.

    Raises:
        ValueError: The images are not as above; no file is written then.
        OSError: A file cannot be written. The images before it stay.
    """
    pictures = pictures_of(images, "save_images")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first_index + i:06d}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        with atomic_write(path) as file:
            picture.save(file, format="PNG")
    return paths
