"""Dynamic thresholding: a clamp on the predicted x_start that each sample sets for itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding, Saharia et al. 2022 (arXiv 2205.11487), section 2.3.

    The predicted x_start of each sample is clamped to [-s, s] and divided by s, where s is the
    quantile ``ratio`` of its absolute values, brought into [1, ``max_value``].

    Attributes:
        ratio: in (0, 1].
        max_value: at least 1, or None for no ceiling.
    """

    ratio: float
    max_value: float | None

    def threshold(
        self,
        x_t: Tensor,
        model_output: Tensor,
        rows: Tensor,
        step: Tensor,
        guidance_scale: Tensor | None = None,
        guidance_factor: Tensor | None = None,
    ) -> Tensor:
        """s of each sample, ``[N]``, for the arguments of :func:`ddpm_fast.ops.reverse_step`."""
        guidance = guidance_scale, guidance_factor, step
        output = reference.guided(model_output, *guidance, x_t.shape[1], rows.dtype)
        row = reference.row_of(rows, step, x_t)
        xstart = reference.predict_xstart(row, x_t.to(rows.dtype), output)
        return self.of(xstart)

    def of(self, xstart: Tensor) -> Tensor:
        """s of each sample, ``[N]``, for ``xstart``, a prediction ``[N, C, ...]``."""
        sizes = xstart.flatten(1).abs()
        return quantile(sizes, self.ratio).clamp(min=1.0, max=self.max_value)


def quantile(values: Tensor, ratio: float) -> Tensor:
    """The quantile ``ratio`` of each row of ``[N, E]``, ``[N]``: linear between two values.

    As torch.quantile, which refuses more than 2**24 numbers before torch 2.14, but that NaN counts
    as the largest number: a few of them do not undo the clamp of all others.
    """
    last = values.shape[1] - 1
    place = ratio * last
    low = int(place)
    # kthvalue would do less work on most rows, but takes forever for one in descending order.
    ordered = values.sort(dim=1).values
    return ordered[:, low].lerp(ordered[:, min(low + 1, last)], place - low)
