"""NumPy's archives of pictures, as OpenAI's code and ``ddpm-fast sample`` write them."""

from __future__ import annotations

import lzma
import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from .fingerprint import evenly_spaced
from .pictures import Pictures, integer_labels

Array = npt.NDArray[Any]

# What NumPy and zipfile raise for a damaged file, or one that claims to be larger than memory:
# RuntimeError for encryption, and NotImplementedError, a subclass, for unknown compression.
_DAMAGES = (
    EOFError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    ValueError,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class NpzDataset(Pictures):
    """The pictures of an npz file, resized, cropped and optionally flipped.

    The array is read once and kept as it is, uint8; pictures are brought to ``image_size`` as
    :class:`~ddpm_fast.data.ImageFolder` does it. Nothing in the file is ever unpickled.

    Args:
        path: the file.
        image_size: height and width of the pictures given out.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the pictures, chosen at random.
        image_column: the array of pictures, uint8 [N, H, W, C] with C = 1 (grey) or 3 (RGB), or
            [N, H, W]; by default OpenAI's, ``arr_0``.
        label_column: the array of labels, integers [N] from 0 on (OpenAI's is ``arr_1``); by
            default there are no labels.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a whole npz file, an array is missing or is not as above, or an
            argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_size: int,
        *,
        channels: Literal[1, 3] = 3,
        flip: bool = True,
        image_column: str = "arr_0",
        label_column: str | None = None,
    ) -> None:
        super().__init__(image_size, channels, flip)
        self.path = Path(path)
        wanted = [image_column] if label_column is None else [image_column, label_column]
        images, *labels = _read_arrays(self.path, wanted)
        self.image_column, self.label_column = image_column, label_column
        self.images = _checked_images(images, f"{path}: {image_column}")
        if label_column is not None:
            self.labels = integer_labels(labels[0], len(self), f"{path}: {label_column}")
            self.num_classes = int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def _open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def _name(self, index: int) -> str:
        return f"{self.path}: picture {index}"

    def _contents(self) -> list[bytes]:
        return [self.images[index].tobytes() for index in evenly_spaced(len(self))]


def _read_arrays(path: Path, names: list[str]) -> list[Array]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: not a whole npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    held = ", ".join(archive.files) or "none"
                    raise ValueError(f"holds no array {name} (it holds {held})")
            arrays = [archive[name] for name in names]
            for name, array in zip(names, arrays, strict=True):
                if not isinstance(array, np.ndarray):  # NumPy gives the bytes of what is none
                    raise ValueError(f"{name} is not an array")
            return arrays
    except _DAMAGES as error:
        raise ValueError(f"{path}: {error}") from error


def _checked_images(images: Array, name: str) -> Array:
    """Those of one channel without it, as Pillow likes them."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[:, :, :, 0]
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (colour or images.ndim == 3) or not images.size:
        raise ValueError(
            f"{name} must be pictures, uint8 [N, H, W, C] with C = 1 or 3, or [N, H, W]; "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images
