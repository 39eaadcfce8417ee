"""The Fréchet distance between two sets of pictures, on features that the user chooses.

Heusel et al. 2017 (arXiv 1706.08500) call it FID where the features are those of one Inception
network. Any other features give another number, so that none here compares with a published FID
unless that network, with its own resizing, is the extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .evaluating import evaluating

Features: TypeAlias = "Tensor | NDArray[np.floating[Any]]"
Extractor = Callable[[Tensor], Tensor]

# Their covariance takes 8 GiB in float64, its root some of that size and hours.
_MOST_FEATURES = 2**15


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch.

    Batches are put together by the formula of Chan, Golub and LeVeque (1983), which subtracts no
    large sums from each other; all is float64 on the CPU, whatever the features are.

    Args:
        dimensions: D, at most 32768.

    Attributes:
        count: how many samples came.
        mean: ``[D]``.

    Raises:
        ValueError: too many dimensions.
    """

    def __init__(self, dimensions: int) -> None:
        if dimensions > _MOST_FEATURES:
            raise ValueError(
                f"{dimensions} features are more than the {_MOST_FEATURES} whose covariance can be "
                "worked with: take smaller pictures or another extractor"
            )
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device="cpu")
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, batches: Iterable[Features]) -> FeatureStatistics:
        """Of all batches together, ``[N, D]`` each, at least one.

        Raises:
            ValueError: there is none, and as the class and :meth:`update`.
        """
        statistics: FeatureStatistics | None = None
        for features in batches:
            if statistics is None:
                statistics = cls(_checked(features).shape[1])
            statistics.update(features)
        if statistics is None:
            raise ValueError("FeatureStatistics: there are no features")
        return statistics

    def update(self, features: Features) -> None:
        """Add ``[N, D]`` features.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        features = _checked(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features must be [N, {len(self.mean)}] as before; got {list(features.shape)}"
            )
        count = self.count + len(features)
        mean = features.mean(dim=0)
        centred, moved = features - mean, mean - self.mean
        self._scatter.addmm_(centred.T, centred)  # in place: it may take gigabytes
        self._scatter.addr_(moved, moved, alpha=self.count * len(features) / count)
        self.mean = self.mean + moved * (len(features) / count)
        self.count = count

    @property
    def cov(self) -> Tensor:
        """``[D, D]``, over N - 1.

        Raises:
            ValueError: there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples; got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(
    first: Features | FeatureStatistics, second: Features | FeatureStatistics
) -> float:
    """The squared Fréchet distance between the Gaussians fitted to two sets of features.

    It shrinks as sets grow: compare sets of one size only.

    Args:
        first, second: ``[N, D]`` features, at least two samples of each, or statistics of them.

    Raises:
        ValueError: another shape, numbers that are not finite, too few samples, or too many
            features.
    """
    a, b = (
        side if isinstance(side, FeatureStatistics) else FeatureStatistics.of([side])
        for side in (first, second)
    )
    return gaussian_frechet_distance(a.mean, a.cov, b.mean, b.cov)


def gaussian_frechet_distance(
    mean1: Features, cov1: Features, mean2: Features, cov2: Features
) -> float:
    """``|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))``, Dowson & Landau 1982.

    Means are ``[D]``, covariances ``[D, D]`` of any rank.

    Raises:
        ValueError: other shapes, or numbers that are not finite.
    """
    mean1, cov1, mean2, cov2 = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu")
        for value in (mean1, cov1, mean2, cov2)
    )
    shapes = [list(value.shape) for value in (mean1, cov1, mean2, cov2)]
    dimensions = mean1.numel()
    if shapes != [[dimensions], [dimensions, dimensions]] * 2:
        raise ValueError(f"means and covariances must be [D] and [D, D]; got {shapes}")
    if not all(bool(value.isfinite().all()) for value in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    # tr (cov1 cov2)^(1/2) is the sum of the singular values of root1 root2, which unlike the
    # eigenvalues of a square have no root to be taken of, nor their rounding.
    cross = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    apart = (mean1 - mean2).square().sum()
    distance = apart + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance.clamp(min=0))  # rounding may lead below


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root; what rounding makes of zero eigenvalues is zero."""
    values, vectors = torch.linalg.eigh(cov)
    noise = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    root: Tensor = (vectors * torch.where(values > noise, values, 0.0).sqrt()) @ vectors.T
    return root


def features_of(extractor: Extractor, images: Tensor, *, batch_size: int = 64) -> Iterator[Tensor]:
    """The features of pictures, batch by batch, for :meth:`FeatureStatistics.of`.

    Args:
        extractor: called with ``[N, C, H, W]`` in [-1, 1]; returns ``[N, D]``. A module is put
            into eval mode meanwhile.
        images: ``[N, C, H, W]`` in [-1, 1], where the extractor wants them.
        batch_size: pictures that the extractor is given at a time.

    Raises:
        ValueError: ``batch_size`` is below 1, or the extractor returns anything but ``[N, D]``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        with evaluating(extractor), torch.no_grad():
            features = extractor(batch)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(batch):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the extractor must return features [{len(batch)}, D]; got {got}")
        yield features


def pixels(images: Tensor) -> Tensor:
    """The simplest extractor: the pixels of images ``[N, C, H, W]``, as ``[N, C * H * W]``."""
    return images.flatten(1)


def _checked(features: Features) -> Tensor:
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(
            f"features must be [N, D], no dimension of size 0; got {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite")
    return features
