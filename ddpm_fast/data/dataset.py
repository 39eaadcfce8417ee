"""What training asks of its data, and the simplest that answers: tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
