"""GaussianDiffusion: its tables and what follows from them, against definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from cases import randn
from ddpm_fast import GaussianDiffusion
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.schedules import BETA_SCHEDULES, named_betas


@pytest.fixture(params=BETA_SCHEDULES)
def diffusion(request: pytest.FixtureRequest) -> GaussianDiffusion:
    return GaussianDiffusion.from_schedule(request.param, 50)


def test_default_is_that_of_the_paper() -> None:
    diffusion = GaussianDiffusion()
    assert diffusion.num_timesteps == 1000
    assert diffusion.betas[0] == 1e-4 and diffusion.betas[-1] == 0.02
    # Ho et al. 2020, section 4: hardly any signal is left in x_T
    assert float(diffusion.alphas_cumprod[-1]) == pytest.approx(4.036e-5, rel=1e-3)


def test_tables_follow_from_the_betas(diffusion: GaussianDiffusion) -> None:
    betas = diffusion.betas.tolist()
    abar = 1.0
    for t, beta in enumerate(betas):
        prev, abar = abar, abar * (1 - beta)
        expected = {
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": prev,
            "sqrt_recip_alphas_cumprod": abar**-0.5,
            "sqrt_recipm1_alphas_cumprod": math.sqrt(1 / abar - 1),
            "posterior_variance": beta * (1 - prev) / (1 - abar),
            "posterior_mean_coef1": beta * math.sqrt(prev) / (1 - abar),
            "posterior_mean_coef2": (1 - prev) * math.sqrt(1 - beta) / (1 - abar),
        }
        for name, value in expected.items():
            assert float(getattr(diffusion, name)[t]) == pytest.approx(value, rel=1e-9), name
    log_variance = diffusion.posterior_log_variance_clipped
    torch.testing.assert_close(log_variance[1:], diffusion.posterior_variance[1:].log())
    assert log_variance[0] == log_variance[1]


def test_one_timestep_is_enough() -> None:
    diffusion = GaussianDiffusion(torch.tensor([0.5]))
    assert diffusion.num_timesteps == 1 and diffusion.alphas_cumprod_prev[0] == 1
    assert diffusion.posterior_log_variance_clipped.isfinite().all()


def test_the_posterior_is_that_of_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: precisions add."""
    diffusion = GaussianDiffusion(named_betas("linear", 20))
    x_start, x_t = randn((6, 2, 3), 0, torch.float64), randn((6, 2, 3), 1, torch.float64)
    t = torch.tensor([1, 2, 5, 10, 18, 19])
    mean, variance, log_variance = diffusion.q_posterior(x_start, x_t, t)
    beta, prev = (a[t].reshape(-1, 1, 1) for a in (diffusion.betas, diffusion.alphas_cumprod_prev))
    precision = (1 - beta) / beta + 1 / (1 - prev)
    expected = ((1 - beta).sqrt() / beta * x_t + prev.sqrt() / (1 - prev) * x_start) / precision
    torch.testing.assert_close(variance, 1 / precision)
    torch.testing.assert_close(log_variance, -precision.log())
    torch.testing.assert_close(mean, expected)


def test_steps_of_q_compose_to_q_sample() -> None:
    """Noising step by step has the mean and the variance of noising at once."""
    diffusion = GaussianDiffusion(named_betas("linear", 30))
    scale, variance = torch.ones(1, 1, dtype=torch.float64), 0.0
    zero = torch.zeros_like(scale)
    for i in range(30):
        t = torch.tensor([i])
        gain = float(diffusion.q_step(torch.ones_like(scale), t, zero))
        spread = float(diffusion.q_step(zero, t, torch.ones_like(scale)))
        scale, variance = scale * gain, variance * gain**2 + spread**2
        x_t, _ = diffusion.q_sample(torch.ones_like(scale), t, zero)
        torch.testing.assert_close(x_t, scale)
        assert variance == pytest.approx(1 - float(diffusion.alphas_cumprod[i]), rel=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_right_output_predicts_x_start(prediction_type: str) -> None:
    diffusion = GaussianDiffusion(prediction_type=prediction_type)
    x_start, noise = randn((5, 3, 4), 0, torch.float64), randn((5, 3, 4), 1, torch.float64)
    t = torch.tensor([0, 1, 10, 500, 999])
    x_t, _ = diffusion.q_sample(x_start, t, noise)
    target = diffusion.training_target(x_start, t, noise)
    torch.testing.assert_close(diffusion.predict_xstart(x_t, t, target), x_start)


def test_l_simple_is_the_mean_squared_error(backend: str) -> None:
    diffusion = GaussianDiffusion()
    x_start, t = randn((4, 2, 5), 0), torch.tensor([0, 9, 99, 999])
    losses = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x_start, t, seed=3)
    _, noise = diffusion.q_sample(x_start, t, seed=3, backend=backend)
    torch.testing.assert_close(losses, noise.square().mean(dim=(1, 2)))


def test_l_simple_refuses_a_wrong_shape() -> None:
    """Broadcasting it would train on a plausible number."""
    sentence = r"the model's output must have the shape of x_start; got \[2, 1, 4\] and \[2, 3, 4\]"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        GaussianDiffusion().training_losses(
            lambda x, t: x[:, :1], randn((2, 3, 4), 0), torch.tensor([0, 1])
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    diffusion, t = GaussianDiffusion(), torch.tensor([999])
    x_t, eps = (randn((1, 3, 4), k).to(dtype) for k in (0, 1))
    predicted = diffusion.predict_xstart(x_t, t, eps)
    exact = diffusion.predict_xstart(x_t.double(), t, eps.double())
    assert predicted.dtype == dtype
    torch.testing.assert_close(predicted.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_timesteps_out_of_range_are_refused() -> None:
    diffusion, x = GaussianDiffusion(), randn((1, 2, 3), 0)
    for t in (-1, 1000):
        with pytest.raises(IndexError):
            diffusion.predict_xstart(x, torch.tensor([t]), x)
        with pytest.raises(IndexError, match=rf"^q_sample: t must lie in \[0, 999\]; got {t}$"):
            diffusion.q_sample(x, torch.tensor([t]))


def test_a_table_made_in_inference_mode_serves_training(backend: str) -> None:
    diffusion, t = GaussianDiffusion(), torch.tensor([5])
    with torch.inference_mode():
        diffusion.q_sample(randn((1, 2), 0), t, seed=0, backend=backend)
    x_start = randn((1, 2), 0).requires_grad_()
    diffusion.q_sample(x_start, t, seed=0, backend=backend)[0].sum().backward()
    assert x_start.grad is not None


def test_noise_and_a_seed_exclude_each_other() -> None:
    x, t = randn((1, 2), 0), torch.tensor([5])
    with pytest.raises(ValueError, match=r"^q_sample: give noise or a seed, not both$"):
        GaussianDiffusion().q_sample(x, t, x, seed=3)


def test_seed_comes_from_torch_where_none_is_given() -> None:
    diffusion = GaussianDiffusion()
    x, t = randn((2, 1, 4), 0), torch.tensor([5, 6])
    drawn = []
    for global_seed in (0, 0, 1):
        torch.manual_seed(global_seed)
        drawn.append(diffusion.q_sample(x, t)[1])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_zero_terminal_snr(schedule: str) -> None:
    """The last x_t is the noise itself, and all tables but the two of epsilon stay finite."""
    diffusion = GaussianDiffusion.from_schedule(
        schedule, 50, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    tables = {name: value for name, value in vars(diffusion).items() if torch.is_tensor(value)}
    infinite = {name for name, table in tables.items() if not table.isfinite().all()}
    assert infinite == {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}

    x_start, noise = randn((2, 3, 4), 0, torch.float64), randn((2, 3, 4), 1, torch.float64)
    t = torch.tensor([49, 49])
    x_t, _ = diffusion.q_sample(x_start, t, noise)
    assert torch.equal(x_t, noise)
    target = diffusion.training_target(x_start, t, noise)
    assert torch.equal(target, -x_start)
    assert torch.equal(diffusion.predict_xstart(x_t, t, target), x_start)
    # q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0): x_t says nothing.
    mean, variance, _ = diffusion.q_posterior(x_start, x_t, t)
    prev = diffusion.alphas_cumprod[48]
    torch.testing.assert_close(mean, prev.sqrt() * x_start)
    torch.testing.assert_close(variance, (1 - prev).expand_as(variance))


@pytest.mark.parametrize(
    "diffusion",
    [
        GaussianDiffusion(),
        GaussianDiffusion.from_schedule("squaredcos_cap_v2", 40, prediction_type="v_prediction"),
        GaussianDiffusion.from_schedule("scaled_linear", 9, beta_start=0.01, beta_end=0.1),
        GaussianDiffusion(torch.tensor([0.1, 0.2]), variance_type="learned", clip_denoised=False),
        GaussianDiffusion.from_schedule("linear", 20, rescale_betas_zero_snr=True),
        GaussianDiffusion(dynamic_thresholding_ratio=0.995, sample_max_value=1.5),
        GaussianDiffusion(dynamic_thresholding_ratio=1.0),
    ],
    ids=["default", "cosine", "ends", "betas", "zero SNR", "thresholding", "no ceiling"],
)
def test_config_round_trip(diffusion: GaussianDiffusion) -> None:
    config = json.loads(json.dumps(diffusion.config()))
    again = GaussianDiffusion.from_config(config)
    assert torch.equal(again.betas, diffusion.betas) and again.config() == diffusion.config()
    for name in ("dynamic_thresholding_ratio", "sample_max_value"):
        assert getattr(again, name) == getattr(diffusion, name)


def test_the_config_of_an_older_checkpoint_stays_the_same() -> None:
    """A run is resumed only where both descriptions are equal."""
    older = {
        "beta_schedule": "linear",
        "num_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "variance_type": None,
        "clip_denoised": True,
    }
    assert GaussianDiffusion.from_config(older).config() == older


@pytest.mark.parametrize(
    ("betas", "sentence"),
    [
        ([], "betas must be a non-empty vector; got shape [0]"),
        ([[0.1]], "betas must be a non-empty vector; got shape [1, 1]"),
        ([0.1, math.nan], "betas must be finite and lie in (0, 1]"),
        ([0.1, math.inf], "betas must be finite and lie in (0, 1]"),
        ([0.0, 0.1], "betas must be finite and lie in (0, 1]"),
    ],
)
def test_bad_betas(betas: list[float], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        GaussianDiffusion(torch.tensor(betas))
    assert str(error.value) == sentence


@pytest.mark.parametrize("option", ["clip_denoised", "rescale_betas_zero_snr"])
def test_flags_are_truth_values(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be True or False; got 'no'$"):
        GaussianDiffusion.from_config({option: "no"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"dynamic_thresholding_ratio": 0.9, "clip_denoised": False},
            "dynamic_thresholding_ratio is a way to clamp: it needs clip_denoised",
        ),
        (
            {"dynamic_thresholding_ratio": 0.0},
            "dynamic_thresholding_ratio must lie in (0, 1]; got 0.0",
        ),
        (
            {"dynamic_thresholding_ratio": 1.5},
            "dynamic_thresholding_ratio must lie in (0, 1]; got 1.5",
        ),
        (
            {"dynamic_thresholding_ratio": math.nan},
            "dynamic_thresholding_ratio must lie in (0, 1]; got nan",
        ),
        (
            {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5},
            "sample_max_value must be finite and at least 1; got 0.5",
        ),
        (
            {"dynamic_thresholding_ratio": 0.9, "sample_max_value": math.inf},
            "sample_max_value must be finite and at least 1; got inf",
        ),
        ({"sample_max_value": 1.5}, "sample_max_value needs a dynamic_thresholding_ratio"),
    ],
)
def test_bad_thresholding(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        GaussianDiffusion(**options)
    assert str(error.value) == sentence


@pytest.mark.parametrize("option", ["prediction_type", "variance_type"])
def test_unknown_options_list_the_known_ones(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be one of .+, .+; got 'eps'$"):
        GaussianDiffusion(**{option: "eps"})
