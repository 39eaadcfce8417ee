"""From values in [-1, 1] to bytes, and to Pillow's images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image


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


def pictures_of(images: torch.Tensor, function: str) -> list[Image.Image]:
    """Images [N, 1 or 3, H, W] as Pillow's: mode "L" for one channel, "RGB" for three.

    Raises:
        ValueError: another number of channels, in the name of ``function``; and as to_uint8.
    """
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        raise ValueError(
            f"{function}: a picture has 1 channel (grey) or 3 (RGB); "
            f"the images have {images.shape[1]}"
        )
    return [
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        for pixels in to_uint8(images)
    ]


def frames_of(
    frames: torch.Tensor | Sequence[torch.Tensor], function: str
) -> list[list[Image.Image]]:
    """Frames of one shape [N, 1 or 3, H, W] as Pillow's images.

    Raises:
        ValueError: no frame, no image, or frames of several shapes, in the name of ``function``;
            and as :func:`pictures_of`.
    """
    shapes = list(dict.fromkeys(tuple(frame.shape) for frame in frames))
    if len(shapes) > 1:
        raise ValueError(
            f"{function}: frames must have one shape; got {list(shapes[0])} and {list(shapes[1])}"
        )
    pictures = [pictures_of(frame, function) for frame in frames]
    if not pictures or not pictures[0]:
        raise ValueError(f"{function}: frames must hold at least one image")
    return pictures
