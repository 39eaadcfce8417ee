"""scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Literal

import torch

from .dataset import TensorDataset


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
