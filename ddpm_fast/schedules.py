"""Noise schedules: the betas of the forward process, and which timesteps a shorter chain visits."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def named_betas(
    beta_schedule: str,
    num_timesteps: int,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    """The betas of a named schedule, float64 ``[num_timesteps]``: ``beta_schedule`` is one of four.

    ``linear`` (Ho et al. 2020, section 4) and ``scaled_linear`` (Rombach et al. 2022: linear in
    sqrt(beta)) run from ``beta_start`` to ``beta_end`` whatever the number of timesteps;
    ``squaredcos_cap_v2`` is the cosine schedule of Nichol & Dhariwal 2021, eq. 17, capped at 0.999;
    ``sigmoid`` follows a logistic curve from -6 to 6 between the two ends (Xu et al. 2022).

    Raises:
        ValueError: unknown schedule, ``num_timesteps`` below 1, or ends outside
            0 < beta_start <= beta_end < 1.
        TypeError: ``num_timesteps`` is no whole number.
    """
    if beta_schedule not in BETA_SCHEDULES:
        known = ", ".join(BETA_SCHEDULES)
        raise ValueError(f"beta_schedule must be one of {known}; got {beta_schedule!r}")
    num_timesteps = operator.index(num_timesteps)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1; got {num_timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            "betas must satisfy 0 < beta_start <= beta_end < 1; "
            f"got beta_start={beta_start} and beta_end={beta_end}"
        )
    if beta_schedule == "squaredcos_cap_v2":
        return _squaredcos(num_timesteps)
    if beta_schedule == "scaled_linear":
        return _linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    if beta_schedule == "sigmoid":
        ramp = torch.sigmoid(_linspace(-6.0, 6.0, num_timesteps))
        return beta_start + (beta_end - beta_start) * ramp
    return _linspace(beta_start, beta_end, num_timesteps)


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")


def _squaredcos(num_timesteps: int, offset: float = 0.008, cap: float = 0.999) -> Tensor:
    grid = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    alphas_cumprod = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=cap)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas whose last timestep is pure noise, float64 ``[T]``: its abar is exactly 0.

    sqrt(abar) is shifted to end at 0 and scaled to start where it did; Lin et al. 2023
    (arXiv 2305.08891), algorithm 1. Sampling from such a timestep needs a network that predicts
    ``v_prediction`` or ``sample``.

    Args:
        betas: ``[T]``, each in (0, 1).

    Raises:
        ValueError: fewer than two betas, or one that is not finite or outside (0, 1).
    """
    betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    inside = (betas > 0) & (betas < 1)
    if betas.dim() != 1 or len(betas) < 2 or not bool(inside.all()):
        raise ValueError("only two betas or more, each in (0, 1), rescale to zero terminal SNR")
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
    return 1 - alphas_cumprod / torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])


def respace(
    num_timesteps: int,
    num_steps: int | None = None,
    spacing: str | Sequence[int] = "trailing",
) -> list[int]:
    """The timesteps that a chain of ``num_steps`` visits, from the noisiest to the cleanest.

    With T = ``num_timesteps`` and N = ``num_steps`` (default T), as in Lin et al. 2023
    (arXiv 2305.08891), Table 2: ``leading`` takes every (T // N)-th step from 0, ``linspace``
    spreads N steps over [0, T - 1] with both ends, ``trailing`` takes every (T / N)-th step back
    from T - 1. With N = 1 ``linspace`` is T - 1 alone, where sampling starts. A list of
    timesteps, strictly decreasing, is taken as it is.

    Raises:
        ValueError: ``num_steps`` outside [1, T], an unknown spacing, a list that is empty, not
            strictly decreasing, outside [0, T - 1], or whose length contradicts ``num_steps``.
        TypeError: a timestep that is not an integer.
    """
    if not isinstance(spacing, str):
        timesteps = [operator.index(t) for t in spacing]
        return _checked_list(num_timesteps, num_steps, timesteps)
    steps = num_timesteps if num_steps is None else num_steps
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"num_steps must lie in [1, {num_timesteps}]; got {steps}")
    if spacing == "leading":
        return [i * (num_timesteps // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        stride = (num_timesteps - 1) / max(steps - 1, 1)
        return [round(num_timesteps - 1 - i * stride) for i in range(steps)]
    if spacing == "trailing":
        return [round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)]
    known = ", ".join(TIMESTEP_SPACINGS)
    raise ValueError(f"timestep_spacing must be one of {known} or a list; got {spacing!r}")


def _checked_list(num_timesteps: int, num_steps: int | None, timesteps: list[int]) -> list[int]:
    decreasing = all(a > b for a, b in pairwise(timesteps))
    inside = all(0 <= t < num_timesteps for t in timesteps)
    if not timesteps or not decreasing or not inside:
        raise ValueError(
            "a list of timesteps must be strictly decreasing and lie in "
            f"[0, {num_timesteps - 1}]; got {timesteps}"
        )
    if num_steps not in (None, len(timesteps)):
        raise ValueError(f"num_steps is {num_steps}, but {len(timesteps)} timesteps were given")
    return timesteps
