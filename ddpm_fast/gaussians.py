"""Densities of diagonal Gaussians, elementwise: what the variational bound is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of each element, in nats.

    Arguments are floating tensors that broadcast; the result has their common shape.
    """
    return 0.5 * (
        logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + (mean1 - mean2).square() / logvar2.exp()
    )


def discretized_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, log_scale: Tensor, levels: int = 256
) -> Tensor:
    """Log-probability, in nats, of the bin of ``x`` under N(mean, exp(log_scale)^2), elementwise.

    Ho et al. 2020 (arXiv 2006.11239), eq. 13: the ``levels`` values that a pixel may have lie
    evenly in [-1, 1]; the bin of each reaches halfway to its neighbours, and those of -1 and 1 to
    infinity. Taken from logarithms of the normal's tails, it stays finite, with a gradient, where
    the bin's probability is too small for a float.

    Args:
        x: pixels in [-1, 1].
        mean, log_scale: of the Gaussian; floating, they broadcast against ``x``.
        levels: 256 for pictures of 8 bits.
    """
    half = 1 / (levels - 1)
    offset = x - mean
    scale = log_scale.exp()
    lower, upper = (offset - half) / scale, (offset + half) / scale
    lowest, highest = x < half - 1, x > 1 - half
    tail = torch.special.log_ndtr(torch.where(lowest, upper, -lower))
    return torch.where(lowest | highest, tail, _log_normal_mass(lower, upper))


def _log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)), taken in the tail that the interval lies in."""
    in_upper_tail = lower + upper > 0
    far = torch.special.log_ndtr(torch.where(in_upper_tail, -upper, lower))
    near = torch.special.log_ndtr(torch.where(in_upper_tail, -lower, upper))
    mass: Tensor = near + torch.log(-torch.expm1(far - near))
    return mass
