"""Bits per dimension: against the closed form on Gaussian data, and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from cases import GaussianModel
from ddpm_fast import GaussianDiffusion
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.likelihood import BitsPerDim, bits_per_dim
from ddpm_fast.schedules import respace

MEAN, STD, LEVELS = 0.3, 0.1, 256
STEP = 2 / (LEVELS - 1)


def cosine(num_timesteps: int = 20, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion.from_schedule("squaredcos_cap_v2", num_timesteps, **options)


def pictures(count: int, size: int = 4) -> Tensor:
    """Pixels N(MEAN, STD^2), rounded to LEVELS levels, none of which is an outermost one."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64)
    return (((MEAN + STD * pixels + 1) / STEP).round() * STEP - 1).float()


class WithVariance(nn.Module):
    """A network that says of the variance, too, what it is told to say at each timestep."""

    def __init__(self, model: nn.Module, said: Tensor | float) -> None:
        super().__init__()
        self.model, self.said = model, said

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        said = self.said[t] if isinstance(self.said, Tensor) else torch.full(t.shape, self.said)
        v = said.to(x.dtype).reshape(-1, 1, 1, 1).expand(x.shape)
        return torch.cat([self.model(x, t), v], dim=1)


# --- closed form ------------------------------------------------------------------------------


def expected_terms(
    diffusion: GaussianDiffusion, timesteps: tuple[int, ...], variance_type: str
) -> list[float]:
    """L_{T-1} ... L_0 in bits, by the papers' formulas; expectations over data and noise."""
    abars = [*diffusion.alphas_cumprod[list(timesteps)].tolist(), 1.0]
    beta = [1 - abar / prev for abar, prev in zip(abars, abars[1:], strict=False)]
    posterior = [b * (1 - p) / (1 - a) for b, a, p in zip(beta, abars, abars[1:], strict=False)]
    terms = []
    for i, (abar, prev) in enumerate(zip(abars, abars[1:], strict=False)):
        # x_0 - E[x_0 | x_t] = from_data (x_0 - MEAN) - from_noise eps
        gain = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
        from_data, from_noise = 1 - gain * math.sqrt(abar), gain * math.sqrt(1 - abar)
        if prev == 1:
            terms.append(expected_decoder_term(from_data, from_noise, math.sqrt(posterior[i - 1])))
            continue
        error = from_data**2 * (STD**2 + STEP**2 / 12) + from_noise**2  # Sheppard's correction
        variance = beta[i] if variance_type == "fixed_large" else posterior[i]
        ratio = posterior[i] / variance
        from_x0 = beta[i] * math.sqrt(prev) / (1 - abar)
        nats = (ratio - 1 - math.log(ratio) + from_x0**2 * error / variance) / 2
        terms.append(nats / math.log(2))
    return terms


def expected_decoder_term(from_data: float, from_noise: float, sigma: float) -> float:
    """-log2 of the bin's probability: a sum over levels, and Gauss-Hermite over the noise."""
    level = np.linspace(-1, 1, LEVELS)[:, None]
    eps, weight = np.polynomial.hermite_e.hermegauss(80)
    error = from_data * (level - MEAN) - from_noise * eps
    bits = -np.log2(mass_of_bin(error, 0, sigma))
    return float((mass_of_bin(level, MEAN, STD) * bits * weight).sum() / weight.sum())


def mass_of_bin(x: Any, mean: float, std: float) -> Any:
    """The probability of the level x under N(mean, std^2), in the lower tail, where it is exact."""
    below = -abs(x - mean)
    return norm.cdf((below + STEP / 2) / std) - norm.cdf((below - STEP / 2) / std)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [None, 7])
def test_terms_are_those_of_the_closed_form(
    prediction_type: str, variance_type: str, num_steps: int | None, backend: str
) -> None:
    diffusion = cosine(
        prediction_type=prediction_type, variance_type=variance_type, clip_denoised=False
    )
    found = bits_per_dim(
        GaussianModel(diffusion, MEAN, STD),
        diffusion,
        pictures(200),
        num_steps=num_steps,
        seed=11,
        batch_size=200,
        backend=backend,
    )
    expected = torch.tensor(expected_terms(diffusion, found.timesteps, variance_type))
    error = found.terms.std(dim=0) / math.sqrt(len(found.terms))
    assert ((found.terms.mean(dim=0) - expected) / error).abs().max() < 4
    total = found.total - found.prior
    assert abs(total.mean() - expected.sum()) / (total.std() / math.sqrt(len(total))) < 4


def test_the_prior_is_the_divergence_of_the_noisiest_state() -> None:
    diffusion, x = cosine(), pictures(3)
    found = bits_per_dim(GaussianModel(diffusion), diffusion, x, seed=0)
    q = torch.distributions.Normal(
        diffusion.sqrt_alphas_cumprod[-1] * x.double(), diffusion.sqrt_one_minus_alphas_cumprod[-1]
    )
    nats = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(found.prior, nats.mean(dim=(1, 2, 3)) / math.log(2))


@pytest.mark.parametrize(
    ("num_timesteps", "num_steps"), [(1, None), (5, None), (200, None), (200, 9)]
)
def test_the_bound_is_the_true_cost_with_the_exact_reverse_chain(
    num_timesteps: int, num_steps: int | None
) -> None:
    """Of Gaussian data each reverse step is Gaussian, however long; with its variance no gap is."""
    x, diffusion = (
        pictures(100),
        cosine(num_timesteps, clip_denoised=False, variance_type="learned"),
    )
    found = bits_per_dim(
        ExactReverse(diffusion, num_steps), diffusion, x, num_steps=num_steps, seed=1
    )
    gap = found.total - true_cost(x)
    assert abs(float(gap.mean() / (gap.std() / math.sqrt(len(gap))))) < 4

    wider = bits_per_dim(
        ExactReverse(diffusion, num_steps, wider=2.0), diffusion, x, num_steps=num_steps, seed=1
    )
    assert (wider.total - found.total).mean() > 0.1


class ExactReverse(nn.Module):
    """Mean and variance of the reverse chain of N(MEAN, STD^2); the variance may be off."""

    def __init__(
        self, diffusion: GaussianDiffusion, num_steps: int | None, wider: float = 1.0
    ) -> None:
        super().__init__()
        timesteps = respace(diffusion.num_timesteps, num_steps, "trailing")
        abar = diffusion.alphas_cumprod[timesteps]
        prev = torch.cat([abar[1:], abar.new_ones(1)])
        beta = 1 - abar / prev
        of_x_start = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
        from_x_start = beta * prev.sqrt() / (1 - abar)
        variance = beta * (1 - prev) / (1 - abar) + from_x_start**2 * of_x_start
        self.log_variance = torch.zeros(diffusion.num_timesteps, dtype=torch.float64)
        self.log_variance[timesteps] = (wider * variance).log()
        self.model = GaussianModel(diffusion, MEAN, STD)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        log_variance = self.log_variance[t].reshape(-1, 1, 1, 1).to(x.dtype)
        return torch.cat([self.model(x, t), log_variance.expand(x.shape)], dim=1)


def true_cost(x: Tensor) -> Tensor:
    """-log2 of each picture's probability, over its pixels."""
    bits = -np.log2(mass_of_bin(x.double().numpy(), MEAN, STD))
    return torch.from_numpy(bits).flatten(1).mean(dim=1)


# --- the parts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed_small() -> BitsPerDim:
    return bound(lambda model: model, "fixed_small")


def bound(change: Callable[[nn.Module], nn.Module], variance_type: str) -> BitsPerDim:
    diffusion = cosine(variance_type=variance_type)
    return bits_per_dim(change(GaussianModel(diffusion)), diffusion, pictures(4), seed=3)


def test_the_total_is_the_sum_and_terms_run_from_noise_to_data(fixed_small: BitsPerDim) -> None:
    torch.testing.assert_close(fixed_small.total, fixed_small.prior + fixed_small.terms.sum(1))
    assert fixed_small.timesteps == tuple(range(19, -1, -1))
    assert fixed_small.terms.shape == (4, 20) and fixed_small.total.dtype == torch.float64


@pytest.mark.parametrize(("v", "variance_type"), [(-1, "fixed_small"), (1, "fixed_large")])
def test_a_learned_range_at_its_ends_is_a_fixed_variance(v: float, variance_type: str) -> None:
    fixed = bound(lambda model: model, variance_type)
    found = bound(lambda model: WithVariance(model, v), "learned_range")
    # The decoder's fixed_large variance is the small one: beta_0 is far below its neighbour's.
    last = None if v == -1 else -1
    torch.testing.assert_close(found.terms[:, :last], fixed.terms[:, :last])


def test_a_learned_variance_is_read_as_a_logarithm(fixed_small: BitsPerDim) -> None:
    said = cosine().posterior_log_variance_clipped
    found = bound(lambda model: WithVariance(model, said), "learned")
    torch.testing.assert_close(found.terms, fixed_small.terms, rtol=1e-5, atol=1e-6)


def test_a_second_half_that_no_variance_reads_is_ignored(fixed_small: BitsPerDim) -> None:
    found = bound(lambda model: WithVariance(model, 7.0), "fixed_small")
    assert torch.equal(found.terms, fixed_small.terms)


@pytest.mark.parametrize(
    ("num_steps", "variance_type"), [(None, "fixed_large"), (10, "fixed_small")]
)
def test_the_default_variance_is_the_samplers(num_steps: int | None, variance_type: str) -> None:
    totals = [
        bits_per_dim(GaussianModel(diffusion), diffusion, pictures(2), num_steps=num_steps, seed=0)
        for diffusion in (cosine(), cosine(variance_type=variance_type))
    ]
    assert torch.equal(totals[0].terms, totals[1].terms)


@pytest.mark.parametrize(
    "clamped", [{}, {"dynamic_thresholding_ratio": 0.9}], ids=["clip", "thresholding"]
)
def test_the_predicted_x_start_is_clamped_as_the_diffusion_says(clamped: dict[str, Any]) -> None:
    def terms(predicted: float, **options: Any) -> Tensor:
        diffusion = cosine(prediction_type="sample", **options)
        model = lambda x, t: torch.full_like(x, predicted)  # noqa: E731
        return bits_per_dim(model, diffusion, pictures(2), seed=0).terms

    unclamped = terms(1.0, clip_denoised=False)
    torch.testing.assert_close(terms(3.0, **clamped), unclamped)
    assert not torch.allclose(terms(3.0, clip_denoised=False), unclamped)


def test_a_certain_decoder_costs_nothing() -> None:
    """With the true x_0 from the network, no KL is left, and the decoder knows the level."""
    x = torch.tensor([-1, -0.125, 0.5, 1]).reshape(1, 1, 2, 2)
    diffusion = cosine(200, prediction_type="sample", variance_type="fixed_small")
    found = bits_per_dim(lambda x_t, t: x.clone(), diffusion, x, levels=17, seed=0)
    torch.testing.assert_close(found.total, found.prior, rtol=0, atol=1e-6)


# --- what must not change it ------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_no_batch_changes_a_bit(batch_size: int, backend: str) -> None:
    diffusion, x = cosine(), pictures(7)
    model = GaussianModel(diffusion)
    whole = bits_per_dim(model, diffusion, x, seed=2, backend=backend)
    parts = bits_per_dim(model, diffusion, x, seed=2, batch_size=batch_size, backend=backend)
    shard = bits_per_dim(model, diffusion, x[2:5], seed=2, first_index=2, backend=backend)
    assert torch.equal(parts.terms, whole.terms) and torch.equal(parts.total, whole.total)
    assert torch.equal(shard.terms, whole.terms[2:5])
    assert not torch.equal(bits_per_dim(model, diffusion, x, seed=3).terms, whole.terms)


def test_without_a_seed_torchs_generator_governs() -> None:
    diffusion = cosine()
    found = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            found.append(bits_per_dim(GaussianModel(diffusion), diffusion, pictures(2)).total)
    assert torch.equal(*found)


def test_each_picture_meets_its_own_label() -> None:
    class Labelled(nn.Module):
        num_classes = 10

        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return class_labels.reshape(-1, 1, 1, 1) / 10 + torch.zeros_like(x)

    diffusion, x = cosine(prediction_type="sample"), pictures(5)
    labels = [3, 1, 4, 1, 5]
    together = bits_per_dim(
        Labelled(), diffusion, x, class_labels=labels, batch_size=2, seed=0
    ).terms
    for i, label in enumerate(labels):
        alone = bits_per_dim(
            Labelled(), diffusion, x[i : i + 1], class_labels=label, seed=0, first_index=i
        )
        assert torch.equal(alone.terms[0], together[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_is_fed_in_its_own_type_in_eval_mode(dtype: torch.dtype) -> None:
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=dtype))
            self.seen: set[Any] = set()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen.add((x.dtype, self.training))
            return x * self.weight

    model = Seeing().train()
    found = bits_per_dim(model, cosine(3), pictures(2), seed=0)
    assert model.seen == {(dtype, False)} and model.training
    assert found.total.dtype == torch.float64 and not found.total.is_inference()


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"levels": 17}, "each pixel must be one of 17 levels, evenly spaced from -1 to 1"),
        ({"images": 255 * pictures(2)}, "each pixel must be one of 256 levels"),
        ({"images": pictures(2) * math.nan}, "each pixel must be one of 256 levels"),
        ({"levels": 1}, "levels must be at least 2; got 1"),
        ({"images": pictures(2).long()}, "must be floating-point numbers .* got torch.int64"),
        ({"images": pictures(2)[:0]}, r"no dimension of size 0; got .* \[0, 1, 4, 4\]"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*64\); got -1"),
        ({"first_index": -1}, "first_index must lie in"),
        ({"num_steps": 21}, "num_steps"),
        ({"class_labels": [1, 2, 3]}, r"class_labels must have shape \[2\]; got \[3\]"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"diffusion": cosine(rescale_betas_zero_snr=True)}, "no step can start at timestep 19"),
    ],
)
def test_mistakes_are_told_before_the_network_is_asked(
    options: dict[str, Any], sentence: str
) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked")

    arguments = {"diffusion": cosine(), "images": pictures(2)} | options
    with pytest.raises(ValueError, match=sentence):
        bits_per_dim(model, **arguments)


@pytest.mark.parametrize(
    ("variance_type", "channels", "sentence"),
    [
        ("fixed_small", 3, r"the model's output must have the shape of x_t, or twice its channels"),
        ("learned_range", 1, "a learned variance needs a model with 2 output channels; got 1"),
    ],
)
def test_an_output_of_another_shape(variance_type: str, channels: int, sentence: str) -> None:
    diffusion = cosine(variance_type=variance_type)
    with pytest.raises(ValueError, match=sentence):
        bits_per_dim(lambda x, t: x.repeat(1, channels, 1, 1), diffusion, pictures(2))
