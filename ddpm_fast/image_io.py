"""Samples as files: a PNG grid to look at, a PNG per image, and the npz that FID evaluators read.

All functions take images [N, C, H, W] with values in [-1, 1], as ``ddpm_fast.sample`` returns them,
and write every file whole or not at all (``ddpm_fast.atomic``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from .atomic import atomic_write

# The look of a grid, in pixels. Pictures smaller than READABLE_SIZE are magnified to it.
READABLE_SIZE = 64
GAP = 12
LABEL_SIZE = 16
LABEL_HEIGHT = 20
PAPER, INK = 255, 60


def to_uint8(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Turn images into bytes: (x + 1) * 127.5 rounded to the nearest integer, clamped to 0 … 255.

    Args:
        images: [N, C, H, W], any floating-point type, on any device. -1 becomes 0 and 1 becomes
            255; values outside, infinities included, become the nearer of the two.

    Returns:
        A uint8 array [N, H, W, C] in C order.

    Raises:
        ValueError: ``images`` has another number of dimensions, is not floating-point, or holds
            NaN, which no pixel value stands for.
    """
    if images.ndim != 4:
        raise ValueError(
            f"to_uint8: images must be [N, C, H, W]; got the shape {list(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"to_uint8: images must be floating-point; got {images.dtype}")
    pixels = images.detach().to("cpu", torch.float32)
    if pixels.isnan().any():
        broken = pixels.isnan().flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"to_uint8: images must not hold NaN; {len(broken)} of {len(images)} do, "
            f"the first at index {broken[0]}"
        )
    pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


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
    _check_colours(images, "save_grid")
    captions = None if labels is None else _captions(labels, len(images), "save_grid")
    pictures = [_picture(pixels) for pixels in to_uint8(images)]
    if not pictures:
        raise ValueError("save_grid: images must hold at least one image")
    if columns is None:
        columns = math.ceil(math.sqrt(len(pictures)))
    if scale is None:
        scale = max(1, math.ceil(READABLE_SIZE / max(1, *images.shape[2:])))
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"save_grid: {name} must be at least 1; got {value}")
    with atomic_write(path) as file:
        _grid(pictures, captions, columns, scale).save(file, format="PNG")


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
    _check_colours(images, "save_images")
    pictures = [_picture(pixels) for pixels in to_uint8(images)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first_index + i:06d}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        with atomic_write(path) as file:
            picture.save(file, format="PNG")
    return paths


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


def _check_colours(images: torch.Tensor, function: str) -> None:
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        raise ValueError(
            f"{function}: a PNG has 1 channel (grey) or 3 (RGB); the images have {images.shape[1]}"
        )


def _captions(labels: Iterable[object], count: int, function: str) -> list[str]:
    values = labels.tolist() if isinstance(labels, torch.Tensor) else labels
    captions = [str(label) for label in values]
    if len(captions) != count:
        raise ValueError(
            f"{function}: labels must be one per image, {count}; got {len(captions)} of them"
        )
    return captions


def _picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """One image [H, W, C] as Pillow's: mode "L" for one channel, "RGB" for three."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _grid(
    pictures: list[Image.Image], captions: list[str] | None, columns: int, scale: int
) -> Image.Image:
    """Paint the pictures in cells, GAP apart and GAP from the edges, each label below its own."""
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side * scale for side in pictures[0].size)
    cell_width, cell_height = width, height
    font = ImageFont.load_default(LABEL_SIZE)
    if captions is not None:
        cell_width = max(width, *(math.ceil(font.getlength(caption)) for caption in captions))
        cell_height += LABEL_HEIGHT
    mode = pictures[0].mode
    paper, ink = ((shade if mode == "L" else (shade,) * 3) for shade in (PAPER, INK))
    size = (GAP + columns * (cell_width + GAP), GAP + rows * (cell_height + GAP))
    canvas = Image.new(mode, size, paper)
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        left = GAP + column * (cell_width + GAP) + (cell_width - width) // 2
        top = GAP + row * (cell_height + GAP)
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions is not None:
            below = (left + width / 2, top + height + LABEL_HEIGHT / 2)
            draw.text(below, captions[i], fill=ink, font=font, anchor="mm")
    return canvas
