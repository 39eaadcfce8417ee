"""Data sets of Hugging Face's library ``datasets``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
from PIL import Image

from .pictures import Pictures, integer_labels

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]


class HuggingFaceDataset(Pictures):
    """A column of pictures of a ``datasets.Dataset``, resized, cropped and optionally flipped.

    Pictures are decoded when a batch asks for them, and brought to ``image_size`` as
    :class:`~ddpm_fast.data.ImageFolder` does it. A format or transform of the data set is left
    aside. Nothing is fetched from a hub.

    Args:
        source: a data set, or a folder that its ``save_to_disk`` wrote.
        image_size: height and width of the pictures given out.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the pictures, chosen at random.
        image_column: a column of the type ``datasets.Image``; by default the only one.
        label_column: a column of labels, ``datasets.ClassLabel`` or integers from 0 on; by default
            there are no labels.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        FileNotFoundError: there is no such folder.
        TypeError: ``source`` is something else, such as an ``IterableDataset``, whose pictures
            cannot be asked for by index.
        ValueError: the folder cannot be read or holds several splits, a column is missing or of
            another type, or an argument is out of range.
    """

    def __init__(
        self,
        source: datasets.Dataset | str | os.PathLike[str],
        image_size: int,
        *,
        channels: Literal[1, 3] = 3,
        flip: bool = True,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__(image_size, channels, flip)
        table, self._source = _opened(source)
        if not len(table):
            raise ValueError(f"{self._source}: holds no pictures")
        self.image_column = _image_column(table, image_column, self._source)
        self._images = table.select_columns(self.image_column).with_format(None)
        self.label_column = label_column
        self._fingerprint: str = table._fingerprint
        if label_column is not None:
            labels = _column_of_labels(table, label_column, self._source)
            named = getattr(table.features[label_column], "num_classes", None)
            self.labels = integer_labels(
                labels, len(self), f"{self._source}: {label_column}", named
            )
            self.num_classes = named or int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self._images)

    def _open(self, index: int) -> Image.Image:
        picture = self._images[index][self.image_column]
        if picture is None:
            raise ValueError("there is none")
        assert isinstance(picture, Image.Image)
        return picture

    def _name(self, index: int) -> str:
        return f"{self._source}: row {index} of {self.image_column}"

    def _contents(self) -> list[bytes]:
        return [self._fingerprint.encode()]


def is_saved_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether ``save_to_disk`` of a ``Dataset`` or ``DatasetDict`` wrote this folder."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _opened(source: datasets.Dataset | str | os.PathLike[str]) -> tuple[datasets.Dataset, str]:
    """The data set, and what an error calls it."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs Hugging Face's datasets, which is not installed:"
            " pip install 'ddpm-fast[datasets]'"
        ) from error
    if isinstance(source, datasets.Dataset):
        return source, "the data set"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "HuggingFaceDataset: source must be a datasets.Dataset or a folder;"
            f" got {type(source).__name__}"
        )
    path = Path(source)
    if not is_saved_dataset(path):
        raise FileNotFoundError(f"{path}: not a folder that save_to_disk of datasets wrote")
    try:
        found = datasets.load_from_disk(path)
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a data set ({reason})") from error
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{path}: holds the splits {', '.join(found)}; name the folder of one of them,"
            f" such as {path / next(iter(found))}"
        )
    return found, str(path)


def _image_column(table: datasets.Dataset, asked: str | None, name: str) -> str:
    import datasets

    features: dict[str, object] = table.features
    found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    listed = ", ".join(found) or "none"
    if asked is not None:
        _check_present(table, asked, name)
        if asked not in found:
            raise ValueError(
                f"{name}: the column {asked} does not hold pictures (those that do: {listed})"
            )
        return asked
    if len(found) != 1:
        raise ValueError(f"{name}: name the column of pictures (those that hold some: {listed})")
    return found[0]


def _column_of_labels(table: datasets.Dataset, column: str, name: str) -> npt.NDArray[Any]:
    _check_present(table, column, name)
    kind = getattr(table.features[column], "dtype", "")
    if not kind.lstrip("u").startswith("int"):
        raise ValueError(f"{name}: the column {column} does not hold integers or class labels")
    labels: npt.NDArray[Any] = (
        table.select_columns(column).with_format("arrow")[:][column].to_numpy()
    )
    return labels


def _check_present(table: datasets.Dataset, column: str, name: str) -> None:
    if column not in table.column_names:
        raise ValueError(
            f"{name}: has no column {column} (its columns: {', '.join(table.column_names)})"
        )
