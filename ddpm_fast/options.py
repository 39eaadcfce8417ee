"""The keyword arguments of ``sample``, for type checkers: its overloads share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex, TypedDict

import torch
from torch import Tensor

from .conditioning import Labels
from .diffusion import GaussianDiffusion
from .guidance import Gradient, Scale
from .solvers import Spacing, StepTable

Callback = Callable[[int, int, Tensor, Tensor], object]


class CallOptions(TypedDict, total=False):
    """What may change from one batch of a ``Sampler`` to the next."""

    seed: SupportsIndex | None
    first_index: SupportsIndex
    generator: torch.Generator | None
    x_T: Tensor | None
    class_labels: Labels | None
    model_kwargs: Mapping[str, Any] | None
    progress: bool
    callback: Callback | None


class SampleOptions(CallOptions, total=False):
    """All of them but ``return_intermediates``, by which the overloads differ."""

    diffusion: GaussianDiffusion | None
    sampler: str | StepTable
    num_steps: int | None
    eta: float
    timestep_spacing: Spacing
    guidance_scale: Scale | None
    guidance_rescale: float
    cond_fn: Gradient | None
    known: Tensor | None
    mask: Tensor | None
    device: torch.device | str | None
    precision: str | None
    compile: bool
    backend: str
