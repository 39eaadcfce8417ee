"""Whole chains against a closed form: for Gaussian data the optimal network is known, every step is
linear, and so mean and variance of the samples follow by recursion.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from cases import GaussianModel
from ddpm_fast import GaussianDiffusion, sample
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.schedules import named_betas, respace

MEAN, STD = 0.3, 0.2
BETAS = named_betas("linear", 200, beta_start=5e-4, beta_end=0.1)  # as noisy as DDPM's thousand


def expected_moments(
    diffusion: GaussianDiffusion, sampler: str, num_steps: int | None, eta: float
) -> tuple[float, float]:
    """Mean and variance after the last step, from N(0, 1), by the papers' formulas."""
    timesteps = respace(diffusion.num_timesteps, num_steps, "trailing")
    abars = [*diffusion.alphas_cumprod[timesteps].tolist(), 1.0]
    large = num_steps is None
    mean, variance = 0.0, 1.0
    for i, (abar, prev) in enumerate(pairwise(abars)):
        # E[x_0 | x_t] = gain x_t + offset
        gain = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
        offset = MEAN * (1 - math.sqrt(abar) * gain)
        beta = 1 - abar / prev
        if sampler == "ddpm":
            from_x0 = beta * math.sqrt(prev) / (1 - abar)
            from_xt = (1 - prev) * math.sqrt(1 - beta) / (1 - abar)
            sigma2 = beta if large else beta * (1 - prev) / (1 - abar)
        else:
            sigma2 = eta**2 * (1 - prev) / (1 - abar) * beta
            from_eps = math.sqrt(max(1 - prev - sigma2, 0))
            from_x0 = math.sqrt(prev) - from_eps * math.sqrt(abar / (1 - abar))
            from_xt = from_eps / math.sqrt(1 - abar)
        if i == len(timesteps) - 1:
            sigma2 = 0
        slope = from_x0 * gain + from_xt
        mean, variance = slope * mean + from_x0 * offset, slope**2 * variance + sigma2
    return mean, variance


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("sampler", "num_steps", "eta"),
    [
        ("ddpm", None, 0.0),
        ("ddpm", 50, 0.0),
        ("ddim", None, 0.0),
        ("ddim", 20, 0.0),
        ("ddim", 50, 1.0),
    ],
)
def test_samples_have_the_moments_of_the_closed_form(
    prediction_type: str,
    sampler: str,
    num_steps: int | None,
    eta: float,
    device: torch.device,
    backend: str,
) -> None:
    diffusion = GaussianDiffusion(BETAS, prediction_type=prediction_type, clip_denoised=False)
    model = GaussianModel(diffusion, MEAN, STD)
    options: dict[str, Any] = {"sampler": sampler, "num_steps": num_steps, "eta": eta}
    x = sample(
        model,
        (64, 1, 16, 16),
        diffusion=diffusion,
        seed=7,
        device=device,
        backend=backend,
        **options,
    ).double()

    mean, variance = expected_moments(diffusion, sampler, num_steps, eta)
    n = x.numel()
    assert abs(float(x.mean()) - mean) / math.sqrt(variance / n) < 4
    assert abs(float(x.var()) - variance) / (variance * math.sqrt(2 / n)) < 4


def test_the_whole_chain_restores_the_data() -> None:
    """The recursion itself: the chain of a thousand steps ends close to N(MEAN, STD^2)."""
    mean, variance = expected_moments(GaussianDiffusion(), "ddpm", None, 0.0)
    assert mean == pytest.approx(MEAN, abs=2e-3) and variance == pytest.approx(STD**2, rel=0.05)
