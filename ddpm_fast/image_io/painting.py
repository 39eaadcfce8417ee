"""Pictures in rows and columns on one sheet of white paper, and the text around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

# The look of a sheet, in pixels. Pictures smaller than READABLE_SIZE are magnified to it.
READABLE_SIZE = 64
GAP = 12
LABEL_SIZE = 16
LABEL_HEIGHT = 20
PAPER, INK = 255, 60


def paint(
    pictures: Sequence[Image.Image],
    columns: int,
    scale: int,
    *,
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    title: str | None = None,
    least_width: int = 0,
) -> Image.Image:
    """The pictures in cells, row by row, GAP apart and GAP from the edges.

    Args:
        pictures: At least one, all of one size and mode.
        columns: Pictures in a row.
        scale: The side of the square that a pixel becomes.
        labels: The text below each picture, or none.
        row_labels: The text to the left of each row, or none.
        column_captions: The text above each column, or none; instead of it,
        title: The text above all of them.
        least_width: Room for titles of this width.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side * scale for side in pictures[0].size)
    step_x = GAP + max(width, text_width(labels), text_width(column_captions))
    step_y = GAP + height + (LABEL_HEIGHT if labels else 0)
    left = GAP + (text_width(row_labels) + GAP if row_labels else 0)
    top = GAP + (LABEL_HEIGHT if column_captions or title is not None else 0)
    size = (max(left + columns * step_x, GAP + least_width + GAP), top + rows * step_y)

    mode = pictures[0].mode
    paper, ink = ((shade if mode == "L" else (shade,) * 3) for shade in (PAPER, INK))
    sheet = Image.new(mode, size, paper)
    draw = ImageDraw.Draw(sheet)

    def write(text: str, x: float, y: float, anchor: str) -> None:
        draw.text((x, y), text, fill=ink, font=_font(), anchor=anchor)

    lefts = [left + column * step_x + (step_x - GAP - width) // 2 for column in range(columns)]
    tops = [top + row * step_y for row in range(rows)]
    for i, picture in enumerate(pictures):
        x, y = lefts[i % columns], tops[i // columns]
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if labels:
            write(labels[i], x + width / 2, y + height + LABEL_HEIGHT / 2, "mm")
    for text, y in zip(row_labels, tops, strict=False):
        write(text, left - GAP, y + height / 2, "rm")
    for text, x in zip(column_captions, lefts, strict=False):
        write(text, x + width / 2, top - GAP / 2, "ms")
    if title is not None:
        write(title, GAP, top - GAP / 2, "ls")
    return sheet


def text_width(texts: Sequence[str]) -> int:
    """The width of the widest; 0 without any."""
    return max((math.ceil(_font().getlength(text)) for text in texts), default=0)


def readable_scale(picture: Image.Image) -> int:
    """The least at which the longer side of a picture has READABLE_SIZE pixels."""
    return max(1, math.ceil(READABLE_SIZE / max(1, *picture.size)))


def as_texts(values: Iterable[object] | None, count: int, wanted: str) -> list[str]:
    """Labels or captions as text, none for None.

    Raises:
        ValueError: not ``count`` of them, in the words of ``wanted``.
    """
    if values is None:
        return []
    texts = [str(v) for v in (values.tolist() if isinstance(values, torch.Tensor) else values)]
    if len(texts) != count:
        raise ValueError(f"{wanted}, {count}; got {len(texts)} of them")
    return texts


def check_at_least_1(function: str, **values: int) -> None:
    """ValueError where one of ``values`` is below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{function}: {name} must be at least 1; got {value}")


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(LABEL_SIZE)
