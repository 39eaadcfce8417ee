"""From pictures of any size and mode, opened one by one, to batches of one shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .fingerprint import fingerprint

# ImageNet-21k has 21,841. Larger numbers are no classes but something else, such as ids, and a
# network's table of so many would not fit into memory.
_MOST_CLASSES = 2**20


class Pictures(ABC):
    """Pictures that are opened when a batch asks for them, by several threads.

    Each is turned as its EXIF orientation says, laid on white where it is transparent, scaled so
    that its shorter side is ``image_size``, cropped at the centre to a square, and optionally
    mirrored. A subclass says how many there are, how to open each, and their labels.

    Args:
        image_size: height and width of the pictures given out.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the pictures, chosen at random.

    Raises:
        ValueError: an argument is out of range.
    """

    labels: Tensor | None = None
    """int64, one for each picture."""
    num_classes: int | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __init__(self, image_size: int, channels: Literal[1, 3], flip: bool) -> None:
        kind = type(self).__name__
        if channels not in (1, 3):
            raise ValueError(f"{kind}: channels must be 1 or 3; got {channels}")
        if image_size < 1:
            raise ValueError(f"{kind}: image_size must be at least 1; got {image_size}")
        self.image_size = image_size
        self.channels = channels
        self.flip = flip
        self._readers = ThreadPoolExecutor(thread_name_prefix=kind)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _open(self, index: int) -> Image.Image:
        """The picture as it is stored; called by several threads at once."""

    @abstractmethod
    def _name(self, index: int) -> str:
        """What an error calls the picture."""

    @abstractmethod
    def _contents(self) -> Iterable[bytes]:
        """What is soon read and tells these pictures from others."""

    def description(self) -> dict[str, Any]:
        """See :class:`~ddpm_fast.data.Dataset`."""
        return {
            "flip": self.flip,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "fingerprint": fingerprint(self._contents(), self.labels),
        }

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :class:`~ddpm_fast.data.Dataset`.

        Raises:
            ValueError: a picture cannot be read; the message names it.
        """
        images = torch.stack(list(self._readers.map(self._read, indices.tolist())))
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images.float() / 127.5 - 1, None if self.labels is None else self.labels[indices]

    def _read(self, index: int) -> Tensor:
        """One picture, uint8 [channels, image_size, image_size]."""
        size = (self.image_size, self.image_size)
        try:
            with self._open(index) as opened:
                image = _eight_bit(ImageOps.exif_transpose(opened))
                image = _on_white(image).convert("RGB" if self.channels == 3 else "L")
                image = ImageOps.fit(image, size, method=Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(
                f"{self._name(index)}: cannot be read as a picture ({reason})"
            ) from error
        return torch.from_numpy(np.array(image)).reshape(*size, self.channels).permute(2, 0, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which ``convert`` would clip instead; refuse other depths."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of unknown range")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Transparent pixels show white, and not the colour that happens to lie beneath."""
    if not image.has_transparency_data:
        return image
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)


def integer_labels(
    values: np.ndarray, count: int, name: str, num_classes: int | None = None
) -> Tensor:
    """Labels of ``count`` pictures, int64.

    Raises:
        ValueError: not ``count`` integers in [0, ``num_classes``), which by default is as many as
            there can be; the message calls them ``name``.
    """
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise ValueError(
            f"{name} must be integers, one for each of the {count} pictures; "
            f"got {values.dtype} {list(values.shape)}"
        )
    limit = num_classes or _MOST_CLASSES
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        raise ValueError(f"{name} must be classes from 0 to {limit - 1}; got {wrong[0]}")
    return torch.from_numpy(values.astype(np.int64))
