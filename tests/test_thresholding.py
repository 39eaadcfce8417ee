"""Dynamic thresholding: the quantile, and the loop that takes a threshold for each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import randn
from ddpm_fast import GaussianDiffusion, sample, sample_progressive
from ddpm_fast.thresholding import quantile

SHAPE = (3, 2, 9, 9)


@given(st.integers(1, 4), st.integers(1, 50), st.floats(0, 1), st.integers(0, 2**31))
def test_quantile_is_torchs(samples: int, elements: int, ratio: float, seed: int) -> None:
    values = randn((samples, elements), seed)
    torch.testing.assert_close(quantile(values, ratio), torch.quantile(values, ratio, dim=1))


def test_quantile_of_more_than_2_to_24_numbers() -> None:
    """pytorch#64947: torch.quantile refused so many before torch 2.14."""
    values = torch.arange(2**24 + 1.0).flip(0)[None]
    assert float(quantile(values, 0.5)) == 2**23


def by_hand(model: Any, diffusion: GaussianDiffusion, ratio: float, most: float) -> list[Any]:
    """The predictions of x_start that Saharia et al. 2022, section 2.3, would continue with."""
    predictions = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1).float()
        x_start = (x - (1 - abar).sqrt() * model(x, t)) / abar.sqrt()
        s = torch.quantile(x_start.flatten(1).abs(), ratio, dim=1).clamp(1, most)
        s = s.reshape(-1, 1, 1, 1)
        predictions.append(x_start.clamp(-s, s) / s)
        return predictions[-1]

    plain = GaussianDiffusion(diffusion.betas, prediction_type="sample", clip_denoised=False)
    drawn = sample(network, SHAPE, diffusion=plain, num_steps=4, seed=0)
    return [*predictions, drawn]


@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
@pytest.mark.parametrize("most", [None, 1.0, 1.7])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_each_sample_sets_its_own_threshold(
    ratio: float, most: float | None, sampler: str, backend: str
) -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x * torch.tensor([0.1, 1.0, 3.0]).reshape(-1, 1, 1, 1)

    diffusion = GaussianDiffusion(dynamic_thresholding_ratio=ratio, sample_max_value=most)
    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": 4, "sampler": sampler}
    steps = list(sample_progressive(model, SHAPE, seed=0, backend=backend, **options))
    if sampler == "ddpm":
        *predictions, drawn = by_hand(model, diffusion, ratio, most or torch.inf)
        for (_, _, found), expected in zip(steps, predictions, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(steps[-1][1], drawn, rtol=1e-4, atol=1e-4)
    for _, _, found in steps:
        assert float(found.abs().max()) <= 1


def test_a_ceiling_of_one_is_the_static_clamp(backend: str) -> None:
    """diffusers' default, sample_max_value = 1, makes its thresholding a clamp to [-1, 1]."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    dynamic = GaussianDiffusion(dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
    options: dict[str, Any] = {"num_steps": 4, "seed": 0, "backend": backend}
    expected = sample(model, SHAPE, diffusion=GaussianDiffusion(), **options)
    assert torch.equal(sample(model, SHAPE, diffusion=dynamic, **options), expected)


def test_guidance_is_thresholded(backend: str) -> None:
    """Imagen's reason for it: large guidance weights saturate the static clamp."""

    class Model(torch.nn.Module):
        num_classes = 2

        def forward(
            self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor
        ) -> torch.Tensor:
            return (0.5 - 0.4 * class_labels.reshape(-1, 1, 1, 1)) * x

    def saturated(**options: Any) -> float:
        diffusion = GaussianDiffusion(prediction_type="sample", **options)
        guidance = {"class_labels": 0, "guidance_scale": 10.0, "guidance_rescale": 0.1}
        run = sample(
            Model(), SHAPE, diffusion=diffusion, num_steps=1, seed=0, backend=backend, **guidance
        )
        return float((run.abs() == 1).float().mean())

    assert saturated(dynamic_thresholding_ratio=0.95) < 0.1 < 0.5 < saturated()
