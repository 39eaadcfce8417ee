"""Guidance towards a condition: all but what the kernel does of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .diffusion import GaussianDiffusion
from .solvers import StepTable

Scale = float | Sequence[float] | Tensor
Gradient = Callable[..., Tensor]


def check_guidance(scale: Scale | None, rescale: float, cond_fn: Gradient | None = None) -> None:
    """ValueError for options out of range, or that exclude each other."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in [0, 1]; got {rescale}")
    if rescale and scale is None:
        raise ValueError("guidance_rescale needs a guidance_scale")
    if cond_fn is not None and scale is not None:
        raise ValueError("give guidance_scale or cond_fn, not both")


def scale_table(scale: Scale, steps: int, batch: int, rows: Tensor) -> Tensor:
    """w of classifier-free guidance as the kernel reads it, ``[steps or 1, batch or 1]``.

    Args:
        scale: one number; ``[batch]``, one for each sample; or ``[steps or 1, batch or 1]``.
        steps: of the table.
        batch: samples.
        rows: for its dtype and device.

    Raises:
        ValueError: another shape, or a number that is not finite.
    """
    try:
        table = torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"guidance_scale must be numbers; got {scale!r}") from None
    shape = list(table.shape)
    table = table.reshape(1, -1) if table.dim() < 2 else table
    if table.dim() > 2 or len(table) not in (1, steps) or table.shape[1] not in (1, batch):
        raise ValueError(
            f"guidance_scale must be one number or have shape [{batch}] or "
            f"[1 or {steps}, 1 or {batch}]; got {shape}"
        )
    if not bool(table.isfinite().all()):
        raise ValueError(f"guidance_scale must be finite; got {scale}")
    return table.clone(memory_format=torch.contiguous_format)  # theirs may change


def rescale_factor(
    output: Tensor, scale: Tensor, step: Tensor, x_t: Tensor, rescale: float
) -> Tensor:
    """What to multiply a guided prediction by, ``[N]``, that guidance may not overexpose.

    Lin et al. 2023 (arXiv 2305.08891), eqs. 15 and 16: at ``rescale`` = 1 the prediction gets the
    standard deviation of the conditional one, at 0 it stays. ``output`` is ``[2N, C or 2C, ...]``,
    ``x_t`` ``[N, C, ...]``.
    """
    channels = x_t.shape[1]
    cond = output[: len(x_t), :channels].to(scale.dtype)
    guided = reference.guided(output, scale, None, step, channels, scale.dtype)
    wanted, found = (x.flatten(1).std(dim=1, correction=0) for x in (cond, guided))
    # A constant prediction has none to change.
    ratio = torch.where(found > 0, wanted / found, 1.0)
    return rescale * ratio + (1 - rescale)


def score_coefs(diffusion: GaussianDiffusion, table: StepTable) -> Tensor:
    """What a gradient of log p(y | x_t) is worth in the network's output, float64 ``[S]``.

    Added to the score of x_t, it takes sqrt(1 - abar) times itself off eps (Dhariwal & Nichol 2021,
    arXiv 2105.05233, eq. 14; Song et al. 2021, arXiv 2011.13456, section 5), and moves x_start and
    v as that does. Where abar is 0, x_t tells a classifier nothing, and its gradient counts for
    nothing.

    Raises:
        ValueError: the table passes timesteps that the diffusion has not.
    """
    if max(table.timesteps) >= diffusion.num_timesteps:
        raise ValueError(
            f"cond_fn needs the diffusion that the table was made for: timestep"
            f" {max(table.timesteps)} is not among {diffusion.num_timesteps}"
        )
    abar = diffusion.alphas_cumprod[list(table.timesteps)]
    if diffusion.prediction_type == "epsilon":
        return -(1 - abar).sqrt()
    sample = diffusion.prediction_type == "sample"
    coefs = (1 - abar) / abar.sqrt() if sample else -((1 - abar) / abar).sqrt()
    return torch.where(abar > 0, coefs, 0.0)


def shifted(output: Tensor, gradient: Tensor, coef: Tensor, channels: int) -> Tensor:
    """The network's output with the gradient's part in its prediction; the variance stays."""
    if gradient.shape != (len(output), channels, *output.shape[2:]):
        raise ValueError(
            f"cond_fn must return a gradient of the shape of x_t; got {list(gradient.shape)}"
        )
    shifted = output.clone()
    shifted[:, :channels] += reference.term(coef, gradient).to(output.dtype)
    return shifted


def gradient_at(cond_fn: Gradient, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """``cond_fn(x_t, t, **kwargs)`` where it can differentiate, whatever the mode around it."""
    with torch.inference_mode(False), torch.enable_grad():
        kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        gradient = cond_fn(x.clone(), t.clone(), **kwargs)
    if not isinstance(gradient, Tensor):
        raise TypeError(f"cond_fn must return a tensor; got {type(gradient).__name__}")
    return gradient.detach()
