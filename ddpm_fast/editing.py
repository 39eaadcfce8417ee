"""Editing with an unconditional or conditional model: inpainting, image to image, inversion."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from . import ops
from .checks import check_is_tensor, walkable
from .diffusion import GaussianDiffusion
from .network import Model
from .resampling import resampled
from .sampler import checked_first_index, checked_shape, sample
from .solvers import Spacing, ddim_inversion, step_table


def inpaint(
    model: Model,
    image: Tensor,
    mask: Tensor,
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    jump_length: int = 10,
    jump_n_sample: int = 10,
    **options: Any,
) -> Tensor:
    """Draws what a mask leaves open of a picture: RePaint, Lugmayr et al. 2022 (arXiv 2201.09865).

    Args:
        model, diffusion, sampler, num_steps, eta, timestep_spacing: as for :func:`sample`. With
            the jumps there are up to ``jump_n_sample`` times as many steps.
        image: ``[N, C, ...]``, in [-1, 1].
        mask: broadcasts against it: 1 where the picture is known, 0 where it is to be drawn.
        jump_length, jump_n_sample: see :func:`ddpm_fast.resampling.resampled`; ``jump_n_sample``
            = 1 goes straight on.
        options: the others of :func:`sample`. A ``guidance_scale`` for each step would have to
            count the repeated ones too.

    Returns:
        ``[N, C, ...]``: the picture itself where the mask is 1.

    Raises:
        ValueError: as :func:`sample` and :func:`ddpm_fast.resampling.resampled`.
    """
    check_is_tensor("image", image)
    diffusion = diffusion or GaussianDiffusion()
    table = step_table(diffusion, sampler, num_steps, eta=eta, timestep_spacing=timestep_spacing)
    table = resampled(table, diffusion, jump_length=jump_length, jump_n_sample=jump_n_sample)
    drawn: Tensor = sample(
        model, image.shape, diffusion=diffusion, sampler=table, known=image, mask=mask, **options
    )
    return drawn


def image_to_image(
    model: Model,
    image: Tensor,
    *,
    strength: float = 0.5,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex | None = None,
    first_index: SupportsIndex = 0,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Noises a picture part of the way, and samples from there: SDEdit (Meng et al. 2022).

    Args:
        model, diffusion, sampler, num_steps, eta, timestep_spacing: as for :func:`sample`.
        seed, first_index, generator, backend: likewise.
        image: ``[N, C, ...]``, in [-1, 1].
        strength: in (0, 1], the part of the steps that is taken, the last of them; at 1 next to
            nothing is left of the picture.
        options: the others of :func:`sample`. A ``guidance_scale`` for each step counts those
            that are taken.

    Returns:
        Like ``image``.

    Raises:
        ValueError: a strength outside (0, 1] or of less than one step, and as :func:`sample`.
    """
    check_is_tensor("image", image)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1]; got {strength}")
    diffusion = diffusion or GaussianDiffusion()
    table = step_table(diffusion, sampler, num_steps, eta=eta, timestep_spacing=timestep_spacing)
    steps = int(strength * len(table) + 1e-9)  # 0.29 of 100 is 29, in binary 28.999...
    if steps == 0:
        raise ValueError(f"strength {strength} of {len(table)} steps is less than one")
    table = table.tail(len(table) - steps)
    image, t = walkable(image), torch.tensor(table.timesteps[0], device=image.device)
    if generator is None:
        seed = int(ops.seed_tensor(seed, "cpu")) % 2**64
        index = _indices(len(image), first_index, image.device)
        start, _ = diffusion.q_sample(image, t, seed=seed, sample_index=index, backend=backend)
    else:
        noise = torch.randn(image.shape, generator=generator, device=generator.device)
        start, _ = diffusion.q_sample(image, t, noise.to(image), backend=backend)
    drawn: Tensor = sample(
        model,
        image.shape,
        diffusion=diffusion,
        sampler=table,
        x_T=start,
        seed=seed,
        first_index=first_index,
        generator=generator,
        backend=backend,
        **options,
    )
    return drawn


def invert(
    model: Model,
    image: Tensor,
    *,
    diffusion: GaussianDiffusion | None = None,
    num_steps: int | None = None,
    timestep_spacing: Spacing = "trailing",
    **options: Any,
) -> Tensor:
    """The x_T from which DDIM leads to a picture: Song et al. 2021, section 5.4.

    Args:
        model, diffusion, num_steps, timestep_spacing: as for :func:`sample`, to be used again with
            ``sampler="ddim"`` and the result as ``x_T``.
        image: ``[N, C, ...]``, in [-1, 1].
        options: the others of :func:`sample`.

    Returns:
        Like ``image``.

    Raises:
        ValueError: as :func:`sample` and :func:`ddpm_fast.solvers.ddim_inversion`.
    """
    check_is_tensor("image", image)
    diffusion = diffusion or GaussianDiffusion()
    table = ddim_inversion(diffusion, num_steps, timestep_spacing=timestep_spacing)
    noise: Tensor = sample(
        model, image.shape, diffusion=diffusion, sampler=table, x_T=image, **options
    )
    return noise


def interpolate(
    model: Model, first: Tensor, second: Tensor, num: int, *, sampler: str = "ddim", **options: Any
) -> Tensor:
    """Samples along the arc from one noise to another: Song et al. 2021, appendix D.5.

    Args:
        model: as for :func:`sample`.
        first, second: x_T at the ends, ``[C, ...]``, as of :func:`initial_noise` or
            :func:`invert`.
        num: how many, both ends included; at least 2.
        sampler: one without noise.
        options: the others of :func:`sample`.

    Returns:
        ``[num, C, ...]``.

    Raises:
        ValueError: fewer than 2, ends of different shapes, that are zero or opposite, which no
            arc joins, and as :func:`sample`.
    """
    num = operator.index(num)
    if num < 2:
        raise ValueError(f"num must be at least 2; got {num}")
    if first.shape != second.shape:
        raise ValueError(
            "first and second must have one shape; "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    arc = slerp(first, second, torch.linspace(0, 1, num).tolist())
    drawn: Tensor = sample(model, arc.shape, x_T=arc, sampler=sampler, **options)
    return drawn


def initial_noise(
    shape: Sequence[int],
    *,
    seed: SupportsIndex,
    first_index: SupportsIndex = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The x_T that :func:`sample` starts from with these arguments, float32 ``shape``."""
    shape, where = checked_shape(shape), ops.seed_tensor(seed, device)
    return ops.philox_normal(
        shape,
        seed=where,
        sample_index=_indices(shape[0], first_index, device),
        timestep=torch.zeros_like(where),
    )


def _indices(count: int, first: SupportsIndex, device: torch.device | str) -> Tensor:
    return torch.arange(count, device=device) + checked_first_index(first, count)


def slerp(first: Tensor, second: Tensor, weights: Sequence[float]) -> Tensor:
    """Points on the arc from ``first`` to ``second``, of one shape (Shoemake 1985).

    One for each of ``weights``, 0 the first and 1 the second: ``[len(weights), ...]``.
    Unlike the chord, it keeps their length, which is what makes noise noise.

    Raises:
        ValueError: one is zero, or they are opposite: no one arc joins these.
    """
    a, b = first.double().flatten(), second.double().flatten()
    lengths = a.norm() * b.norm()
    angle = (a @ b / lengths).clamp(-1, 1).arccos()
    if not lengths > 0 or angle > torch.pi - 1e-9:
        raise ValueError("first and second must not be zero, nor opposite: no one arc joins these")
    w = torch.tensor(weights, dtype=torch.float64, device=first.device)[:, None]
    if angle.sin() < 1e-9:
        arc = a.lerp(b, w)
    else:
        arc = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()
    return arc.to(first.dtype).reshape(-1, *first.shape)
