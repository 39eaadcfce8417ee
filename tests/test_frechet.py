"""The Fréchet distance: closed forms, sets without full rank, and batches that change nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from cases import randn
from ddpm_fast.frechet import (
    FeatureStatistics,
    features_of,
    frechet_distance,
    gaussian_frechet_distance,
    pixels,
)


def features(count: int, dimensions: int, seed: int, rank: int | None = None) -> Tensor:
    """Rows of a Gaussian with a mean and covariance of its own."""
    rank = rank or dimensions
    mix = randn((rank, dimensions), seed + 1, torch.float64)
    mean = randn((dimensions,), seed + 2, torch.float64)
    return randn((count, rank), seed, torch.float64) @ mix + mean


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=0), x.T.cov().reshape(x.shape[1], x.shape[1])


# --- the distance -----------------------------------------------------------------------------


def test_diagonal_gaussians() -> None:
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    std1, std2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 0.5])
    wanted = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    found = gaussian_frechet_distance(mean1, std1.square().diag(), mean2, std2.square().diag())
    assert found == pytest.approx(float(wanted))


@pytest.mark.parametrize("dimensions", [1, 2, 17])
def test_the_root_of_the_product_is_scipys(dimensions: int) -> None:
    (mean1, cov1), (mean2, cov2) = (moments(features(200, dimensions, seed)) for seed in (0, 10))
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    apart = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    found = gaussian_frechet_distance(mean1, cov1, mean2, cov2)
    assert found == pytest.approx(float(apart) - 2 * np.trace(root).real, rel=1e-9)


def test_gaussians_on_lines_and_planes() -> None:
    """Of N(0, a a^T) and N(0, b b^T) the distance is |a|^2 + |b|^2 - 2 |a b|."""
    a, b = (randn((300,), seed, torch.float64) for seed in range(2))
    zero = torch.zeros_like(a)
    found = gaussian_frechet_distance(zero, torch.outer(a, a), zero, torch.outer(b, b))
    assert found == pytest.approx(float(a @ a + b @ b - 2 * (a @ b).abs()), rel=1e-12)
    assert gaussian_frechet_distance(zero, torch.outer(a, a), zero, torch.diag(zero)) == (
        pytest.approx(float(a @ a))
    )


@pytest.mark.parametrize(("count", "dimensions"), [(500, 4), (20, 100)])
def test_a_set_is_not_far_from_itself(count: int, dimensions: int) -> None:
    x = features(count, dimensions, 0)
    size = float(moments(x)[1].trace())
    assert abs(frechet_distance(x, x)) < 1e-12 * size
    assert frechet_distance(x, x + 2) == pytest.approx(4 * dimensions)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12 * size)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_lead_below_zero(seed: int) -> None:
    x = features(20, 100, seed)
    assert frechet_distance(x, x) >= 0


@pytest.mark.parametrize("rank", [4, 2])
def test_it_is_symmetric_and_ignores_order_and_rotation(rank: int) -> None:
    x, y = features(500, 4, 0, rank), features(300, 4, 10, rank)
    distance = frechet_distance(x, y)
    rotation = torch.linalg.qr(randn((4, 4), 20, torch.float64)).Q
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert distance > 0.1
    assert frechet_distance(y, x) == pytest.approx(distance)
    assert frechet_distance(x, shuffled) == pytest.approx(distance)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(distance)


def test_arrays_and_statistics_serve_as_well() -> None:
    x, y = features(50, 3, 0), features(40, 3, 10)
    distance = frechet_distance(x, y)
    assert frechet_distance(x.numpy(), y.float()) == pytest.approx(distance, rel=1e-5)
    assert frechet_distance(FeatureStatistics.of([x]), y) == distance


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [3, 90, 7], [64, 36]])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_batches_have_the_statistics_of_the_whole(sizes: list[int], offset: float) -> None:
    x = features(100, 5, 0) + offset
    found = FeatureStatistics.of(x.split(sizes))
    mean, cov = moments(x)
    assert found.count == 100
    torch.testing.assert_close(found.mean, mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.cov, cov, rtol=1e-9, atol=1e-9)


# --- features ---------------------------------------------------------------------------------


def test_features_come_in_batches_from_a_network_in_eval_mode() -> None:
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.seen: list[tuple[int, bool]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append((len(images), self.training))
            return self.weight * images.flatten(1)

    extractor, images = Seeing().train(), randn((7, 3, 2, 2), 0)
    found = torch.cat(list(features_of(extractor, images, batch_size=3)))
    assert torch.equal(found, pixels(images)) and not found.requires_grad
    assert extractor.seen == [(3, False), (3, False), (1, False)] and extractor.training


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(3), r"features must be \[N, D\], no dimension of size 0; got \[3\]"),
        (torch.zeros(0, 2), r"features must be \[N, D\], no dimension of size 0; got \[0, 2\]"),
        (torch.full((2, 2), math.nan), "features must be finite"),
        (torch.zeros(1, 2), "a covariance needs at least two samples; got 1"),
        (
            torch.zeros(2, 3),
            r"must be \[D\] and \[D, D\]; got \[\[3\], \[3, 3\], \[2\], \[2, 2\]\]",
        ),
    ],
)
def test_features_that_will_not_do(x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        frechet_distance(x, randn((5, 2), 0))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite(place: int, value: float) -> None:
    moments_of_both = [torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)]
    moments_of_both[place] = moments_of_both[place] + value
    with pytest.raises(ValueError, match="^means and covariances must be finite$"):
        gaussian_frechet_distance(*moments_of_both)


def test_too_many_features_are_refused_before_their_covariance_is_made() -> None:
    sentence = "786432 features are more than the 32768 .* smaller pictures or another extractor$"
    with pytest.raises(ValueError, match=sentence):
        FeatureStatistics.of(features_of(pixels, torch.zeros(2, 3, 512, 512)))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_no_pictures_are_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"^batch_size must be at least 1; got {batch_size}$"):
        list(features_of(pixels, torch.zeros(2, 3, 4, 4), batch_size=batch_size))


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="there are no features"):
        FeatureStatistics.of([])
    with pytest.raises(ValueError, match=r"features must be \[N, 2\] as before; got \[4, 3\]"):
        FeatureStatistics.of([torch.zeros(4, 2), torch.zeros(4, 3)])


@pytest.mark.parametrize(
    ("returned", "got"), [(torch.zeros(2, 3, 1), r"\[2, 3, 1\]"), ([1.0], "list")]
)
def test_an_extractor_that_returns_no_features(returned: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"must return features \[2, D\]; got {got}"):
        list(features_of(lambda images: returned, torch.zeros(2, 1, 2, 2)))
