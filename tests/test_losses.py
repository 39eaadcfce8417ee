"""What training costs a network: losses, weights, the hybrid bound, offset noise; closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cases import randn
from ddpm_fast import GaussianDiffusion
from ddpm_fast.diffusion import PREDICTION_TYPES
from ddpm_fast.gaussians import discretized_gaussian_log_likelihood
from ddpm_fast.losses import min_snr_weight

DOUBLE = torch.float64
T = torch.tensor([0, 1, 400, 999])


def batch() -> tuple[Tensor, Tensor]:
    """x_start [4, 2, 3, 3] in [-1, 1], and noise."""
    return randn((4, 2, 3, 3), 0, DOUBLE).clamp(-1, 1), randn((4, 2, 3, 3), 1, DOUBLE)


@pytest.mark.parametrize(
    ("loss", "of_element"),
    [
        ("mse", lambda error: error**2),
        ("l1", lambda error: abs(error)),
        ("huber", lambda error: error**2 / 2 if abs(error) < 1 else abs(error) - 0.5),
    ],
)
def test_losses_of_elements(loss: str, of_element: object) -> None:
    x_start, noise = batch()
    losses = GaussianDiffusion().training_losses(
        lambda x, t: torch.zeros_like(x), x_start, T, noise=noise, loss=loss
    )
    wanted = [sum(map(of_element, sample.flatten().tolist())) / 18 for sample in noise]
    torch.testing.assert_close(losses, torch.tensor(wanted, dtype=DOUBLE))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss must be one of mse, l1, huber; got 'l2'$"):
        GaussianDiffusion().training_losses(lambda x, t: x, *batch(), loss="l2")


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_the_error_of_x_start_whatever_is_predicted(gamma: float) -> None:
    """One and the same x_start, told as epsilon, sample or v, costs min(SNR, gamma) its error."""
    x_start, noise = batch()
    error = randn(x_start.shape, 2, DOUBLE)
    for prediction_type in PREDICTION_TYPES:
        diffusion = GaussianDiffusion(prediction_type=prediction_type)

        def model(x_t: Tensor, t: Tensor, diffusion: GaussianDiffusion = diffusion) -> Tensor:
            abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            wrong = x_start + error
            eps = (x_t - abar.sqrt() * wrong) / (1 - abar).sqrt()
            v = abar.sqrt() * eps - (1 - abar).sqrt() * wrong
            return {"epsilon": eps, "sample": wrong, "v_prediction": v}[diffusion.prediction_type]

        losses = diffusion.training_losses(
            model, x_start, T, noise=noise, loss="mse", min_snr_gamma=gamma
        )
        snr = diffusion.alphas_cumprod[T] / (1 - diffusion.alphas_cumprod[T])
        wanted = snr.clamp(max=gamma) * error.square().flatten(1).mean(1)
        torch.testing.assert_close(losses, wanted)


def test_min_snr_at_zero_terminal_snr_is_finite() -> None:
    snr = torch.zeros(1)
    weights = [min_snr_weight(snr, prediction, 5.0).item() for prediction in PREDICTION_TYPES]
    assert weights == [1, 0, 0]


def test_min_snr_of_an_unknown_prediction_is_refused() -> None:
    sentence = "prediction_type must be one of epsilon, sample, v_prediction; got 'v'"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        min_snr_weight(torch.ones(1), "v", 5.0)


class Outputs(nn.Module):
    """Learns its very output: 2C channels, prediction and variance."""

    def __init__(self, prediction: Tensor, v: Tensor) -> None:
        super().__init__()
        self.prediction, self.v = nn.Parameter(prediction), nn.Parameter(v)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.prediction, self.v], dim=1)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_the_hybrid_objective(prediction_type: str, variance_type: str) -> None:
    """L_simple + 0.001 T L_t / (D log 2), written out; L_t trains the variance alone."""
    x_start, noise = batch()
    diffusion = GaussianDiffusion(prediction_type=prediction_type, variance_type=variance_type)
    model = Outputs(randn(x_start.shape, 2, DOUBLE), randn(x_start.shape, 3, DOUBLE) - 1)
    losses = diffusion.training_losses(model, x_start, T, noise=noise)

    d = diffusion
    target = d.training_target(x_start, T, noise)
    simple = (model.prediction - target).square().flatten(1).mean(1)
    x_t, _ = d.q_sample(x_start, T, noise)
    f = (model.v + 1) / 2
    low = d.posterior_log_variance_clipped[T].reshape(-1, 1, 1, 1)
    in_range = f * d.betas[T].log().reshape(-1, 1, 1, 1) + (1 - f) * low
    log_variance = model.v if variance_type == "learned" else in_range
    mean, _, _ = d.q_posterior(d.predict_xstart(x_t, T, model.prediction.detach()), x_t, T)
    true_mean, _, true_log_variance = d.q_posterior(x_start, x_t, T)
    p = torch.distributions.Normal(mean, (log_variance / 2).exp())
    q = torch.distributions.Normal(true_mean, (true_log_variance / 2).exp().expand_as(mean))
    nats = torch.distributions.kl_divergence(q, p)
    nats[0] = -discretized_gaussian_log_likelihood(x_start[0], mean[0], log_variance[0] / 2)
    bound = nats.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(losses, simple + 0.001 * 1000 * bound)

    prediction_grad, v_grad = torch.autograd.grad(losses.sum(), [model.prediction, model.v])
    torch.testing.assert_close(
        prediction_grad, torch.autograd.grad(simple.sum(), model.prediction)[0]
    )
    torch.testing.assert_close(v_grad, torch.autograd.grad(bound.sum(), model.v)[0])


def test_the_bound_is_least_at_the_true_variance() -> None:
    """With the posterior's own mean, the best log-variance is the posterior's."""
    diffusion = GaussianDiffusion(prediction_type="sample", variance_type="learned")
    x_start, noise = batch()
    t = torch.tensor([1, 10, 400, 999])
    x_t, _ = diffusion.q_sample(x_start, t, noise)
    true = diffusion.posterior_log_variance_clipped[t].reshape(-1, 1, 1, 1)
    at, above, below = (
        diffusion.vlb_terms(x_start, x_t, t, x_start, true + offset) for offset in (0, 0.1, -0.1)
    )
    torch.testing.assert_close(at, torch.zeros(4, dtype=DOUBLE), atol=1e-12, rtol=0)
    assert (above > 0.001).all() and (below > 0.001).all()


@pytest.mark.parametrize("v", [-25.0, -20.0, 22.0])
def test_the_bound_has_a_gradient_where_the_decoder_would_have_none(v: float) -> None:
    """The decoder is no part of the terms above t = 0."""
    diffusion = GaussianDiffusion(variance_type="learned")
    x_start, noise = (tensor[:2].float() for tensor in batch())
    model = Outputs(torch.zeros_like(x_start), torch.full_like(x_start, v))
    losses = diffusion.training_losses(model, x_start, torch.tensor([999, 500]), noise=noise)
    losses.sum().backward()
    assert losses.isfinite().all() and model.v.grad.isfinite().all()


def test_the_bound_at_other_levels() -> None:
    diffusion = GaussianDiffusion()
    x_start, t = torch.tensor([[[-1.0, 0.2]]], dtype=DOUBLE), torch.tensor([0])
    log_variance = torch.tensor(-4.0, dtype=DOUBLE)
    found = diffusion.vlb_terms(x_start, x_start, t, x_start, log_variance, levels=11)
    mean, *_ = diffusion.q_posterior(x_start, x_start, t)
    nats = -discretized_gaussian_log_likelihood(x_start, mean, log_variance / 2, levels=11)
    torch.testing.assert_close(found, nats.mean(dim=(1, 2)) / math.log(2))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", None])
def test_a_fixed_variance_reads_no_channels(variance_type: str | None) -> None:
    diffusion = GaussianDiffusion(variance_type=variance_type)
    found = diffusion.reverse_log_variance(torch.zeros(4, 0, 3, dtype=DOUBLE), T).flatten()
    posterior = diffusion.posterior_log_variance_clipped[T]
    beta = torch.cat([posterior[:1], diffusion.betas[T[1:]].log()])
    assert torch.equal(found, posterior if variance_type == "fixed_small" else beta)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_variance_is_not_learned_from_epsilon_where_no_signal_is_left(
    variance_type: str,
) -> None:
    x_start, noise = batch()
    diffusion = GaussianDiffusion.from_schedule(
        rescale_betas_zero_snr=True, variance_type=variance_type
    )
    sentence = "cannot be trained with prediction_type epsilon and zero-terminal SNR"
    with pytest.raises(ValueError, match=sentence):
        diffusion.training_losses(lambda x, t: torch.cat([x, x], dim=1), x_start, T, noise=noise)


@pytest.mark.parametrize(
    ("prediction_type", "learned"),
    [("epsilon", False), ("sample", True), ("v_prediction", True)],
)
@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
def test_what_can_be_learned_at_zero_terminal_snr(
    prediction_type: str, learned: bool, min_snr_gamma: float | None
) -> None:
    x_start, noise = batch()
    diffusion = GaussianDiffusion.from_schedule(
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
        variance_type="learned_range" if learned else None,
    )
    losses = diffusion.training_losses(
        lambda x, t: torch.cat([x, x], dim=1) if learned else x,
        x_start,
        T,
        noise=noise,
        min_snr_gamma=min_snr_gamma,
    )
    assert losses.isfinite().all()


def test_a_learned_variance_needs_twice_the_channels() -> None:
    diffusion = GaussianDiffusion(variance_type="learned_range")
    sentence = (
        r"the model's output must have the shape of x_start, with twice its channels for a learned"
        r" variance; got \[1, 1, 4\] and \[1, 1, 4\]"
    )
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        diffusion.training_losses(lambda x, t: x, randn((1, 1, 4), 0), torch.tensor([0]))


def test_offset_noise_is_one_more_number_for_each_channel() -> None:
    """The target is noise + strength * offset, and x_t is made of it."""
    diffusion = GaussianDiffusion()
    x_start = randn((3, 2, 64, 64), 0, DOUBLE)
    t, seen = torch.tensor([0, 500, 999]), []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    losses = diffusion.training_losses(model, x_start, t, seed=7, offset_noise=3.0)
    _, plain = diffusion.q_sample(x_start, t, seed=7)
    abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noise = (seen[0] - abar.sqrt() * x_start) / (1 - abar).sqrt()
    torch.testing.assert_close(losses, noise.square().flatten(1).mean(1))
    offset = (noise - plain) / 3
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset))
    assert len(offset[..., 0, 0].unique()) == 6
    assert (offset[..., 0, 0] - plain[..., 0, 0]).abs().min() > 1e-3  # not the noise once more


def test_offset_noise_is_of_unit_variance_and_of_the_sample_index() -> None:
    diffusion, t = GaussianDiffusion(), torch.full((20_000,), 5)
    x_start, index = torch.zeros(20_000, 1, 1, 1, dtype=DOUBLE), torch.arange(20_000)
    kept = [
        diffusion._offset_noise(x_start, t, 2.0, 3, index),
        diffusion._offset_noise(x_start[9:], t[9:], 2.0, 3, index[9:]),
    ]
    assert torch.equal(kept[0][9:], kept[1])
    assert kept[0].var().item() == pytest.approx(1 + 2.0**2, rel=0.05)


def test_offset_noise_and_given_noise_exclude_each_other() -> None:
    x_start, noise = batch()
    with pytest.raises(ValueError, match=r"^offset_noise is added to drawn noise, and noise was"):
        GaussianDiffusion().training_losses(
            lambda x, t: x, x_start, T, noise=noise, offset_noise=0.1
        )
