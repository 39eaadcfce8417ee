"""A folder of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from .pictures import Pictures

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


class ImageFolder(Pictures):
    """The image files in a folder and its subfolders, resized, cropped and optionally flipped.

    Hidden files and folders are left out, and links to folders are followed.

    Each picture is turned as its EXIF orientation says, laid on white where it is transparent,
    scaled so that its shorter side is ``image_size``, and cropped at the centre to a square. Files
    are taken in the order of their paths, and read when a batch asks for them.

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
        super().__init__(image_size, channels, flip)
        self.path = Path(path)
        self.files = _image_files(self.path)
        self.class_names = _class_names(self.path, self.files) if class_labels else ()
        if class_labels:
            number = {name: label for label, name in enumerate(self.class_names)}
            self.labels = torch.tensor([number[_class_of(self.path, f)] for f in self.files])
            self.num_classes = len(number)

    def __len__(self) -> int:
        return len(self.files)

    def _open(self, index: int) -> Image.Image:
        return Image.open(self.files[index])

    def _name(self, index: int) -> str:
        return str(self.files[index])

    def _contents(self) -> Iterator[bytes]:
        for file in self.files:
            name = file.relative_to(self.path).as_posix()
            yield os.fsencode(f"{name}\0{file.stat().st_size}\0")


def _image_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a folder of pictures")
    files = sorted(
        file
        for folder, names in _folders(path)
        for file in (folder / name for name in names)
        if file.suffix.lower() in IMAGE_EXTENSIONS
        and not file.name.startswith(".")
        and file.is_file()
    )
    if not files:
        raise ValueError(f"{path}: holds no pictures (looked for {' '.join(IMAGE_EXTENSIONS)})")
    return files


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it with the names of their files: not hidden ones, but those linked.

    A link to a folder that it lies in is not followed.
    """
    for name, folders, files in os.walk(path, followlinks=True):
        folder = Path(name)
        around = {parent.resolve() for parent in (folder, *folder.parents)}
        folders[:] = [
            inner
            for inner in folders
            if not inner.startswith(".") and (folder / inner).resolve() not in around
        ]
        yield folder, files


def _class_names(path: Path, files: Sequence[Path]) -> tuple[str, ...]:
    for file in files:
        if file.parent == path:
            raise ValueError(f"{file}: lies outside the class folders of {path}")
    return tuple(sorted({_class_of(path, file) for file in files}))


def _class_of(path: Path, file: Path) -> str:
    return file.relative_to(path).parts[0]
