"""Gaussian densities: against torch.distributions, sums to one, and far tails."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from cases import randn
from ddpm_fast.gaussians import discretized_gaussian_log_likelihood, normal_kl


def test_kl_is_that_of_torch() -> None:
    mean1, logvar1, mean2, logvar2 = (randn((5, 7), seed, torch.float64) for seed in range(4))
    wanted = kl_divergence(Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), wanted)


def test_kl_of_a_distribution_to_itself_is_zero() -> None:
    mean, logvar = randn((9,), 0), randn((9,), 1)
    assert normal_kl(mean, logvar, mean, logvar).abs().max() < 1e-6


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("mean", [-1.7, 0.0, 0.31])
@pytest.mark.parametrize("log_scale", [-5.0, -1.0, 1.0])
def test_probabilities_of_all_levels_add_up_to_one(
    levels: int, mean: float, log_scale: float
) -> None:
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    parameters = (torch.full_like(x, value) for value in (mean, log_scale))
    log_likelihood = discretized_gaussian_log_likelihood(x, *parameters, levels=levels)
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "low", "high"), [(-1, -math.inf, -0.9), (0.2, 0.1, 0.3), (1, 0.9, math.inf)]
)
def test_a_bin_reaches_halfway_to_its_neighbours(x: float, low: float, high: float) -> None:
    mean, log_scale = torch.tensor([[0.1, -0.3], [0.5, -1.5]], dtype=torch.float64)
    found = discretized_gaussian_log_likelihood(torch.tensor(x), mean, log_scale, levels=11)
    normal = Normal(mean, log_scale.exp())
    lower, upper = (normal.cdf(torch.tensor(end, dtype=torch.float64)) for end in (low, high))
    torch.testing.assert_close(found, (upper - lower).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("mean", [-40.0, 40.0])
def test_far_tails_are_finite_and_pull_the_mean_back(x: float, mean: float) -> None:
    parameters = [torch.tensor(mean, requires_grad=True), torch.tensor(-4.0, requires_grad=True)]
    found = discretized_gaussian_log_likelihood(torch.tensor(x), *parameters)
    pull, widen = torch.autograd.grad(found, parameters)
    assert all(value.isfinite() for value in (found, pull, widen))
    towards_an_edge = abs(x) == 1 and x * mean > 0
    assert bool(found == 0 if towards_an_edge else found < -1e5)
    assert bool(pull == widen == 0 if towards_an_edge else pull * mean < 0 and widen > 0)


@pytest.mark.parametrize("x", [-1.0, 0.5, 1.0])
@pytest.mark.parametrize("mean", [-1e6, 0.3, 0.5, 50.0, 1e6])
@pytest.mark.parametrize("log_scale", [-25.0, -20.0, -10.0, 13.0, 25.0])
def test_float32_is_finite_at_any_width(x: float, mean: float, log_scale: float) -> None:
    parameters = [torch.tensor(value, requires_grad=True) for value in (mean, log_scale)]
    found = discretized_gaussian_log_likelihood(torch.tensor(x), *parameters)
    assert found.dtype == torch.float32
    assert all(value.isfinite() for value in (found, *torch.autograd.grad(found, parameters)))


@pytest.mark.parametrize("deviations", [0.0, 3.0, -999.0, 1001.0, 1e5])
def test_a_narrow_bin_has_the_probability_of_its_density(deviations: float) -> None:
    """On both sides of where the formula changes."""
    for half_width in (0.99e-4, 1.01e-4):
        scale = 0.1 / half_width
        mean = torch.tensor(-deviations * scale, dtype=torch.float64)
        log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
        found = discretized_gaussian_log_likelihood(torch.tensor(0.0), mean, log_scale, levels=11)
        wanted = norm.logpdf(deviations) + math.log(2 * half_width)
        assert found.item() == pytest.approx(wanted, rel=1e-8)
        (widen,) = torch.autograd.grad(found, log_scale)
        assert widen.item() == pytest.approx(deviations**2 - 1, rel=1e-6)


@pytest.mark.parametrize("deviations", [-999.0, -1001.0, -1e6])
def test_the_far_tail_is_scipys(deviations: float) -> None:
    """An outermost bin's probability is all of a tail."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    mean = torch.tensor(-0.9 - deviations * 2, dtype=torch.float64, requires_grad=True)
    found = discretized_gaussian_log_likelihood(torch.tensor(-1.0), mean, scale.log(), levels=11)
    assert found.item() == pytest.approx(norm.logcdf(deviations), rel=1e-10)
    (pull,) = torch.autograd.grad(found, mean)
    assert pull.item() == pytest.approx((deviations + 1 / deviations) / 2, rel=1e-8)


def test_gradients_are_those_of_the_numbers() -> None:
    x = torch.tensor([-1, -0.6, 0.2, 1], dtype=torch.float64)
    parameters = [randn((4,), seed, torch.float64).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(
        lambda mean, log_scale: discretized_gaussian_log_likelihood(x, mean, log_scale, levels=11),
        parameters,
    )
