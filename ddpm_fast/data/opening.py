"""Pictures on disk, whichever way they are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .folder import ImageFolder
from .huggingface import HuggingFaceDataset, is_saved_dataset
from .npz import NpzDataset
from .pictures import Pictures


def open_dataset(
    path: str | os.PathLike[str],
    image_size: int,
    *,
    channels: Literal[1, 3] = 3,
    flip: bool = True,
    class_labels: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Pictures:
    """Open a folder of image files, an npz file, or a folder that ``datasets`` saved.

    Args:
        path: the folder or file. A folder is of ``datasets`` if it has that library's state.json.
        image_size: height and width of the pictures given out.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the pictures, chosen at random.
        class_labels: of a folder of image files: take its subfolders as classes.
        image_column: of the others: the array or column that holds the pictures.
        label_column: of the others: the array or column that holds the labels.

    Raises:
        ValueError: an option that is not for this kind of data; and see
            :class:`~ddpm_fast.data.ImageFolder`, :class:`~ddpm_fast.data.NpzDataset` and
            :class:`~ddpm_fast.data.HuggingFaceDataset` for this and other errors.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    given = {name: column for name, column in columns.items() if column is not None}
    is_npz = Path(path).suffix.lower() == ".npz"
    if is_npz or is_saved_dataset(path):
        if class_labels:
            raise ValueError(f"{path}: not a folder of image files, whose subfolders are classes")
        kind = NpzDataset if is_npz else HuggingFaceDataset
        return kind(path, image_size, channels=channels, flip=flip, **given)
    if given:
        raise ValueError(f"{path}: has no columns, which are of npz files and of datasets' folders")
    return ImageFolder(path, image_size, channels=channels, flip=flip, class_labels=class_labels)
