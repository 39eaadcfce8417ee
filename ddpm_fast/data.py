"""Training pictures: scikit-learn's handwritten digits, or a folder of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Dataset(Protocol):
    """What training asks of its data: any batch, as a function of the indices and a generator."""

    @property
    def num_classes(self) -> int | None:
        """The number of labels, or None where pictures have none."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Pictures [N, C, H, W], float32 in [-1, 1], and int64 labels [N] where there are any.

        Args:
            indices: int64 [N], each below ``len(self)``.
            generator: the only source of randomness, for augmentation.
        """


class TensorDataset:
    """Pictures that are in memory already.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
        labels: int64 [N], each below ``num_classes``; None where there are none.
        num_classes: the number of labels.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :class:`Dataset`; nothing is augmented."""
        return self.images[indices], None if self.labels is None else self.labels[indices]


def digits(part: Literal["train", "held_out", "all"] = "all") -> TensorDataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey pictures in 10 classes, scaled to [-1, 1].

    ``"train"`` is the first half (898 pictures) and ``"held_out"`` the second (899), in the order
    of the data set. The data do not say who wrote what, but the halves differ far more than random
    halves do, as if each were by other writers.

    Raises:
        ValueError: for another part.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if part not in ("train", "held_out", "all"):
        raise ValueError(f"digits: part must be one of train, held_out, all; got {part!r}")
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed:"
            " pip install 'ddpm-fast[digits]'"
        ) from error
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1  # 0 ... 16
    labels = torch.tensor(source.target, dtype=torch.int64)
    half = len(images) // 2
    chosen = {"all": slice(None), "train": slice(half), "held_out": slice(half, None)}[part]
    return TensorDataset(images[chosen], labels[chosen], num_classes=10)


class ImageFolder:
    """The image files in a folder and its subfolders, resized, cropped and optionally flipped.

    Each picture is turned as its EXIF orientation says, scaled so that its shorter side is
    ``image_size``, and cropped at the centre to a square. Files are taken in the order of their
    paths, and read when a batch asks for them.

    Args:
        path: the folder.
        image_size: height and width of the pictures given out.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the pictures, chosen at random.
        class_labels: take the subfolders of ``path``, in the order of their names, as classes.

    Raises:
        NotADirectoryError: ``path`` is not a folder.
        ValueError: it holds no image files, a picture lies outside the class folders, or an
            argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_size: int,
        *,
        channels: Literal[1, 3] = 3,
        flip: bool = True,
        class_labels: bool = False,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"ImageFolder: channels must be 1 or 3; got {channels}")
        if image_size < 1:
            raise ValueError(f"ImageFolder: image_size must be at least 1; got {image_size}")
        self.path = Path(path)
        self.image_size = image_size
        self.channels = channels
        self.flip = flip
        self.files = _image_files(self.path)
        self.class_names = _class_names(self.path, self.files) if class_labels else ()
        self.num_classes = len(self.class_names) or None
        self._readers = ThreadPoolExecutor(thread_name_prefix="ImageFolder")

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :class:`Dataset`.

        Raises:
            ValueError: a file cannot be read as a picture; the message names it.
        """
        files = [self.files[index] for index in indices.tolist()]
        images = torch.stack(list(self._readers.map(self._read, files)))
        if self.flip:
            mirrored = torch.rand(len(files), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images.float() / 127.5 - 1, self._labels(files)

    def _labels(self, files: Sequence[Path]) -> Tensor | None:
        if self.num_classes is None:
            return None
        return torch.tensor([self.class_names.index(_class_of(self.path, file)) for file in files])

    def _read(self, file: Path) -> Tensor:
        """One picture, uint8 [channels, image_size, image_size]."""
        size = (self.image_size, self.image_size)
        try:
            with Image.open(file) as opened:
                image = _eight_bit(ImageOps.exif_transpose(opened))
                image = image.convert("RGB" if self.channels == 3 else "L")
                image = ImageOps.fit(image, size, method=Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{file}: cannot be read as a picture ({reason})") from error
        return torch.from_numpy(np.array(image)).reshape(*size, self.channels).permute(2, 0, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which ``convert`` would clip instead; refuse other depths."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of unknown range")
    return image


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a folder of pictures")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_EXTENSIONS
        and not file.name.startswith(".")
        and file.is_file()
    )
    if not files:
        raise ValueError(f"{path}: holds no pictures (looked for {' '.join(IMAGE_EXTENSIONS)})")
    return files


def _class_names(path: Path, files: Sequence[Path]) -> tuple[str, ...]:
    for file in files:
        if file.parent == path:
            raise ValueError(f"{file}: lies outside the class folders of {path}")
    return tuple(sorted({_class_of(path, file) for file in files}))


def _class_of(path: Path, file: Path) -> str:
    return file.relative_to(path).parts[0]
