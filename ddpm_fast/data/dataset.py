"""What training asks of its data, and the simplest that answers: tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import dtype_name
from .fingerprint import evenly_spaced, fingerprint


class Dataset(Protocol):
    """What training asks of its data: any batch, as a function of the indices and a generator.

    It may also have ``description()``, a JSON-able dict of what tells it from other data. A
    checkpoint keeps that, and a run is not resumed on data of another description.
    """

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

    Raises:
        ValueError: no pictures, or pictures or labels that are not as above.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None
    ) -> None:
        if images.dtype != torch.float32 or images.dim() != 4 or not images.numel():
            raise ValueError(
                "TensorDataset: images must be float32 [N, C, H, W], none of these 0;"
                f" got {_told(images)}"
            )
        if (labels is None) != (num_classes is None):
            raise ValueError("TensorDataset: labels and num_classes must be given together")
        if labels is not None and num_classes is not None:
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"TensorDataset: labels must be int64 [{len(images)}]; got {_told(labels)}"
                )
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"TensorDataset: labels must be classes from 0 to {num_classes - 1};"
                    f" got {int(wrong[0])}"
                )
        self.images = images
        self.labels = labels
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :class:`Dataset`; nothing is augmented."""
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def description(self) -> dict[str, Any]:
        """See :class:`Dataset`; the fingerprint is of a few pictures and all labels."""
        images = self.images[evenly_spaced(len(self))].cpu().numpy()
        return {"fingerprint": fingerprint([images.tobytes()], self.labels)}


def _told(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
