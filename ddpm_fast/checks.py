"""Argument checks of the reference backend, in the words of csrc/checks.h.

Each function raises TypeError for a dtype, IndexError for an index out of range and ValueError for
all else, with one sentence: the op, the argument, what was wanted and what came.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Argument(NamedTuple):
    """A tensor with the words that name it in an error."""

    op: str
    name: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of a dtype are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_floating(a: Argument) -> None:
    """A dtype that a state can have."""
    if a.tensor.dtype not in STATE_DTYPES:
        raise TypeError(
            f"{a} must be float32, float64, bfloat16 or float16; got {dtype_name(a.tensor.dtype)}"
        )


def check_dtype(a: Argument, wanted: torch.dtype) -> None:
    """Exactly one dtype."""
    if a.tensor.dtype != wanted:
        raise TypeError(f"{a} must be {dtype_name(wanted)}; got {dtype_name(a.tensor.dtype)}")


def check_both_double(a: Argument, like: Argument) -> None:
    """float64 goes with float64 alone."""
    if (a.tensor.dtype == torch.float64) != (like.tensor.dtype == torch.float64):
        raise TypeError(
            f"{a} and {like.name} must both be float64, or neither; "
            f"got {dtype_name(a.tensor.dtype)} and {dtype_name(like.tensor.dtype)}"
        )


def check_device(a: Argument, like: Argument) -> None:
    """The same device."""
    if a.tensor.device != like.tensor.device:
        raise ValueError(
            f"{a} must be on the device of {like.name}; "
            f"got {a.tensor.device} and {like.tensor.device}"
        )


def check_batch(a: Argument) -> None:
    """``[N, C, ...]``."""
    if a.tensor.dim() < 2:
        raise ValueError(
            f"{a} must have at least two dimensions, [N, C, ...]; got {_shape(a.tensor)}"
        )


def check_same_shape(a: Argument, like: Argument) -> None:
    """The same shape."""
    if a.tensor.shape != like.tensor.shape:
        raise ValueError(
            f"{a} must have the shape of {like.name}; "
            f"got {_shape(a.tensor)} and {_shape(like.tensor)}"
        )


def _has_shape(tensor: Tensor, like: Tensor, times_samples: int, times_channels: int) -> bool:
    samples, channels, *pixels = like.shape
    return list(tensor.shape) == [times_samples * samples, times_channels * channels, *pixels]


def check_output_shape(a: Argument, like: Argument, *, guided: bool) -> None:
    """A network's output: for each sample, or with guidance twice for each.

    The second half of doubled channels is a variance.
    """
    times = 2 if guided else 1
    if not any(_has_shape(a.tensor, like.tensor, times, channels) for channels in (1, 2)):
        raise ValueError(
            f"{a} must have {'twice the samples of x_t' if guided else 'the shape of x_t'}, or "
            f"twice its channels; got {_shape(a.tensor)} and {_shape(like.tensor)}"
        )


def check_is_tensor(name: str, value: object) -> None:
    """TypeError for anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def is_walkable(tensor: Tensor) -> bool:
    """Whether a kernel can walk a batch: each sample's pixels are evenly spaced in memory."""
    stride, span = None, 1
    for size, step in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        stride = step if stride is None else stride
        if step != stride * span:
            return False
        span *= size
    return True


def walkable(tensor: Tensor) -> Tensor:
    """The tensor itself where a kernel can walk it, else a copy."""
    return tensor if tensor.is_contiguous() or is_walkable(tensor) else tensor.contiguous()


def check_layout(a: Argument) -> None:
    """Each sample contiguous or channels_last, or a slice of such."""
    if a.tensor.numel() != 0 and not is_walkable(a.tensor):
        raise ValueError(
            f"{a} must be contiguous or channels_last within each sample; "
            f"got shape {_shape(a.tensor)} with strides {list(a.tensor.stride())}"
        )


def check_index(a: Argument, like: Argument, *, scalar_allowed: bool) -> None:
    """int64, one entry for the batch or one for each sample."""
    check_dtype(a, torch.int64)
    check_device(a, like)
    per_sample = _shape(a.tensor) == [like.tensor.shape[0]]
    scalar = scalar_allowed and a.tensor.dim() == 0
    if not per_sample and not scalar:
        wanted = f"{'[] or ' if scalar_allowed else ''}[{like.tensor.shape[0]}]"
        raise ValueError(f"{a} must have shape {wanted}; got {_shape(a.tensor)}")


def check_rows(a: Argument, like: Argument, columns: int) -> None:
    """A table of rows, in the compute dtype."""
    check_dtype(a, compute_dtype(like.tensor.dtype))
    check_device(a, like)
    table = a.tensor
    if table.dim() != 2 or table.shape[1] != columns or not table.is_contiguous():
        raise ValueError(
            f"{a} must be contiguous with shape [number of rows, {columns}]; "
            f"got {_shape(table)} with strides {list(table.stride())}"
        )


def check_scale(a: Argument, like: Argument, rows: Argument) -> None:
    """One number for each row of the table and each sample, or one for all of either."""
    check_dtype(a, compute_dtype(like.tensor.dtype))
    check_device(a, like)
    sizes = len(rows.tensor), len(like.tensor)
    shape = _shape(a.tensor)
    if len(shape) != 2 or any(n not in (1, size) for n, size in zip(shape, sizes, strict=True)):
        raise ValueError(f"{a} must have shape [1 or {sizes[0]}, 1 or {sizes[1]}]; got {shape}")


def check_per_sample(a: Argument, like: Argument) -> None:
    """One number for each sample."""
    check_dtype(a, compute_dtype(like.tensor.dtype))
    check_device(a, like)
    if _shape(a.tensor) != [len(like.tensor)]:
        raise ValueError(f"{a} must have shape [{len(like.tensor)}]; got {_shape(a.tensor)}")


def check_range(index: Argument, rows: Argument) -> None:
    """Indices of rows; read only where they lie on the host, so that no device is waited for."""
    if index.tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    last = rows.tensor.shape[0] - 1
    outside = index.tensor[(index.tensor < 0) | (index.tensor > last)]
    if outside.numel():
        raise IndexError(f"{index} must lie in [0, {last}]; got {int(outside.flatten()[0])}")


def check_one_source(
    op: str, noise: Tensor | None, seed: Tensor | None, sample_index: Tensor | None
) -> None:
    """Noise that is drawn, given, or absent."""
    if (seed is None) != (sample_index is None):
        raise ValueError(f"{op}: seed and sample_index must be given together")
    if noise is not None and seed is not None:
        raise ValueError(f"{op}: give noise or a seed, not both")


def check_noise_source(
    like: Argument, noise: Tensor | None, seed: Tensor | None, sample_index: Tensor | None
) -> None:
    """One source of noise, its tensors fit for the batch."""
    check_one_source(like.op, noise, seed, sample_index)
    if seed is not None and sample_index is not None:
        check_index(Argument(like.op, "seed", seed), like, scalar_allowed=True)
        check_index(Argument(like.op, "sample_index", sample_index), like, scalar_allowed=False)


def check_like(a: Argument, like: Argument) -> None:
    """Like the batch in shape, dtype and device, and laid out so that a kernel can walk it."""
    check_dtype(a, like.tensor.dtype)
    check_device(a, like)
    check_same_shape(a, like)
    check_layout(a)


def _same_view(a: Tensor, b: Tensor) -> bool:
    same_memory = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return same_memory and a.shape == b.shape and a.stride() == b.stride()


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size()


def check_no_overlap(written: Argument, other: Argument, *, same_view_allowed: bool) -> None:
    """Memory spans that do not meet, gaps included."""
    if torch.compiler.is_compiling() or 0 in (written.tensor.numel(), other.tensor.numel()):
        return
    if same_view_allowed and _same_view(written.tensor, other.tensor):
        return
    (first, end), (other_first, other_end) = _span(written.tensor), _span(other.tensor)
    if first < other_end and other_first < end:
        raise ValueError(f"{written} must not overlap the memory of {other.name}")


def _elements_are_apart(tensor: Tensor) -> bool:
    span = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < span:
            return False
        span += step * (size - 1) if size > 1 else 0
    return True


def _check_apart(a: Argument) -> None:
    if a.tensor.numel() != 0 and not _elements_are_apart(a.tensor):
        raise ValueError(
            f"{a} must not share memory among its elements; got strides {list(a.tensor.stride())}"
        )


def check_output(a: Argument, like: Argument) -> None:
    """A tensor to write into: each element at an address of its own."""
    check_like(a, like)
    _check_apart(a)


def check_next_input(a: Argument, like: Argument) -> None:
    """What the network reads next, in any type, and with guidance twice."""
    check_floating(a)
    check_both_double(a, like)
    check_device(a, like)
    if not any(_has_shape(a.tensor, like.tensor, samples, 1) for samples in (1, 2)):
        raise ValueError(
            f"{a} must have the shape of {like.name}, or twice its samples; "
            f"got {_shape(a.tensor)} and {_shape(like.tensor)}"
        )
    check_layout(a)
    _check_apart(a)


def check_next_step(a: Argument, step: Argument, like: Argument) -> None:
    """Like the step index."""
    check_dtype(a, torch.int64)
    check_device(a, like)
    check_same_shape(a, step)
    _check_apart(a)


def check_next_t(a: Argument, like: Argument) -> None:
    """A timestep for each sample that the network is asked for."""
    check_dtype(a, torch.int64)
    check_device(a, like)
    samples = len(like.tensor)
    if _shape(a.tensor) not in ([samples], [2 * samples]):
        raise ValueError(
            f"{a} must have shape [{samples}] or [{2 * samples}]; got {_shape(a.tensor)}"
        )
    _check_apart(a)


def check_carry_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """What is written into has no gradient to carry."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{op}: what is written into carries no gradient, but a tensor requires one"
        )


def check_not_negated(op: str, **written: Tensor | None) -> None:
    """The dispatcher would hand a kernel a copy of a lazily negated view, and drop the result."""
    for name, tensor in written.items():
        if tensor is not None and tensor.is_neg():
            raise ValueError(f"{op}: {name} must not be a lazily negated view")
