"""A model as the sampling loop calls it: on its device, in its precision, its output checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import walkable

Model = Callable[..., Tensor]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network:
    """``model``, called as ``model(x_t, t, **kwargs)``.

    Attributes:
        device: where it computes; ``device``, or else that of its weights.
        dtype: of its weights, and so of what it is to be fed; float32 where it has none.
        call: the model itself, or compiled.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: torch.device | str | None = None,
        precision: str | None = None,
        compile: bool = False,
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        weight = _first_weight(model)
        self.model = model
        self.device = torch.device(device or (weight.device if weight is not None else "cpu"))
        self.dtype = weight.dtype if weight is not None else torch.float32
        self._precision = precision
        self.call = torch.compile(model) if compile else model

    def __call__(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The output, :func:`ready` for the kernel."""
        return ready(self.call(x, t, **kwargs), x)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a precision asks for."""
        if self._precision is None:
            return contextlib.nullcontext()
        if self._precision == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        # A graph must not read weights that were cast for this context, and end with it.
        keep_cast_weights = self.device.type != "cuda"
        dtype = PRECISIONS[self._precision]
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=keep_cast_weights)

    def memory_format(self, dims: int) -> torch.memory_format:
        """channels_last where the model's convolutions are laid out so."""
        weights = self.model.parameters() if isinstance(self.model, nn.Module) and dims == 4 else ()
        for weight in weights:
            if weight.dim() == 4 and not weight.is_contiguous():
                return torch.channels_last
        return torch.contiguous_format

    def addresses(self) -> list[int]:
        """Where the model's numbers lie, which a graph has by heart."""
        if not isinstance(self.model, nn.Module):
            return []
        return [x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers())]


def ready(output: object, x: Tensor) -> Tensor:
    """A model's output for ``x``, in memory of its own and so that the kernel can walk it.

    Raises:
        TypeError: not a tensor.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor; got {type(output).__name__}")
    first = x.data_ptr()
    if first <= output.data_ptr() < first + x.nbytes:
        output = output.clone()  # its input is about to be overwritten
    return walkable(output)


def check_has_variance(output: Tensor, channels: int) -> None:
    """ValueError for an output without the second half that a learned variance is read from."""
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"a learned variance needs a model with {2 * channels} output channels; "
            f"got {output.shape[1]}"
        )


def _first_weight(model: Model) -> Tensor | None:
    if not isinstance(model, nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)
