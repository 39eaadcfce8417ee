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
    if not _has_null_label(model):
        raise ValueError(
            f"guidance_scale needs a model with a null label; this one has {num_classes} classes"
            " and no label beside them"
        )
    return int(num_classes)


def with_null(labels: Tensor, model: object) -> Tensor:
    """The labels and, behind them, as many null labels: what a guided step asks a network for."""
    return torch.cat([labels, torch.full_like(labels, null_label(model))])


def checked_labels(labels: Labels, batch: int, model: object) -> Tensor:
    """int64 ``[batch]``, each a class of the model or, where it has one, its null label."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels must be integers; got {labels.dtype}")
    labels = labels.to(torch.int64)
    if labels.dim() == 0:
        labels = labels.expand(batch)
    if list(labels.shape) != [batch]:
        raise ValueError(f"class_labels must have shape [{batch}]; got {list(labels.shape)}")
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None:
        last = num_classes if _has_null_label(model) else num_classes - 1
        if not bool(((labels >= 0) & (labels <= last)).all()):
            null = f", or be the null label {num_classes}" if last == num_classes else ""
            raise ValueError(f"class_labels must lie in [0, {num_classes - 1}]{null}")
    return labels.contiguous()


def _has_null_label(model: object) -> bool:
    """A model with classes has the null label unless it says ``null_label = False``."""
    return bool(getattr(model, "null_label", True))
