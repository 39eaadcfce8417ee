"""Class labels and the null label of classifier-free guidance, as the network is given them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Labels = int | Sequence[int] | Tensor


def null_label(model: object) -> int:
    """The label that stands for none, which comes behind the model's classes."""
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError("guidance_scale needs a model with num_classes, the null label")
    return int(num_classes)


def checked_labels(labels: Labels, batch: int, model: object) -> Tensor:
    """int64 ``[batch]``, each a class of the model or its null label."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels must be integers; got {labels.dtype}")
    labels = labels.to(torch.int64)
    if labels.dim() == 0:
        labels = labels.expand(batch)
    if list(labels.shape) != [batch]:
        raise ValueError(f"class_labels must have shape [{batch}]; got {list(labels.shape)}")
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and not bool(((labels >= 0) & (labels <= num_classes)).all()):
        raise ValueError(
            f"class_labels must lie in [0, {num_classes - 1}], or be the null label {num_classes}"
        )
    return labels.contiguous()
