"""Animations of the denoising, as GIF or WebP."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_write
from .painting import as_texts, check_at_least_1, paint, readable_scale, text_width
from .pixels import frames_of

# What Pillow is told of each, by its extension.
ANIMATIONS: dict[str, dict[str, Any]] = {
    ".gif": {"format": "GIF"},
    ".webp": {"format": "WEBP", "lossless": True},
}

# Browsers slow down what is shorter, and GIF cannot count much further.
_DURATIONS = range(20, 600_001)


def save_animation(
    frames: torch.Tensor | Sequence[torch.Tensor],
    path: str | os.PathLike[str],
    *,
    captions: Iterable[object] | None = None,
    labels: Iterable[object] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    duration: int = 80,
    last_duration: int = 2000,
) -> None:
    """Write frames one after the other, each a grid as that of ``save_grid``, again and again.

    Args:
        frames: K moments of N samples, [K, N, C, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB), or
            a sequence of [N, C, H, W]; such as the ``x_t`` or the ``pred_xstart`` of
            :class:`ddpm_fast.Intermediates`.
        path: The file to write: ``.gif``, which has 256 colours a frame, or ``.webp``, which has
            all, and keeps every pixel.
        captions: What to write above each frame, K of anything that ``str`` reads well; or a
            tensor [K]. None leaves them and the room for them out.
        labels, columns, scale: As for :func:`save_grid`, of the N images of each frame.
        duration: How long a frame is shown, in milliseconds, 20 ... 600000; GIF counts tens.
        last_duration: How long the last one is, likewise, before all begins again.

    Raises:
        ValueError: The frames are not as above or hold nothing, the extension is another, not as
            many captions or labels were given, or a number is out of range.
        OSError: The file cannot be written.
    """
    extension = Path(path).suffix.lower()
    if extension not in ANIMATIONS:
        raise ValueError(f"save_animation: the file must end in .gif or .webp; got {path}")
    moments = frames_of(frames, "save_animation")
    count = len(moments[0])
    heads = as_texts(captions, len(moments), "save_animation: captions must be one per frame")
    texts = as_texts(labels, count, "save_animation: labels must be one per image")
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if scale is None:
        scale = readable_scale(moments[0][0])
    check_at_least_1("save_animation", columns=columns, scale=scale)
    for name, value in (("duration", duration), ("last_duration", last_duration)):
        if value not in _DURATIONS:
            raise ValueError(
                f"save_animation: {name} must lie in [20, 600000] milliseconds; got {value}"
            )
    titles: list[str | None] = [*heads] or [None] * len(moments)
    first, *others = (
        paint(pictures, columns, scale, labels=texts, title=title, least_width=text_width(heads))
        for pictures, title in zip(moments, titles, strict=True)
    )
    durations = [duration] * len(others) + [last_duration]
    with atomic_write(path) as file:
        first.save(
            file,
            save_all=True,
            append_images=others,
            duration=durations,
            loop=0,  # for ever
            **ANIMATIONS[extension],
        )
