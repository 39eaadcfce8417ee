"""Densities of diagonal Gaussians, elementwise: what the variational bound is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Half a bin in standard deviations, below which the density hardly changes within it.
_NARROW = 1e-4
# Standard deviations, below which the tail's asymptote is exact to 1e-11 of its logarithm.
_FAR = -1e3
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


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
    infinity. Taken in float64 from logarithms of the normal's tails, it stays finite, with a
    gradient, where the bin's probability is too small for a float: at least for means within
    +-1e6 and log-scales within +-25.

    Args:
        x: pixels in [-1, 1].
        mean, log_scale: of the Gaussian; floating, they broadcast against ``x``.
        levels: 256 for pictures of 8 bits.

    Returns:
        The widest of the arguments' types.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), log_scale.dtype)
    half = 1 / (levels - 1)
    lowest, highest = x < half - 1, x > 1 - half
    scale = log_scale.double().exp()
    middle, half_width = (x.double() - mean.double()) / scale, half / scale
    tail = _log_ndtr(half_width + torch.where(lowest, middle, -middle))
    mass = _log_normal_mass(middle, half_width)
    return torch.where(lowest | highest, tail, mass).to(dtype)


def _log_normal_mass(middle: Tensor, half_width: Tensor) -> Tensor:
    """log(Phi(middle + half_width) - Phi(middle - half_width)).

    Taken in the tail that the interval lies in; of a narrow one, whose ends' logarithms are too
    close to be told apart, the density in the middle times the width.
    """
    narrow = half_width < _NARROW
    density = -0.5 * middle.square() - _LOG_SQRT_2PI + torch.log(2 * half_width)
    wide_enough = torch.where(narrow, _NARROW, half_width)
    near = _log_ndtr(wide_enough - middle.abs())
    far = _log_ndtr(-wide_enough - middle.abs())
    return torch.where(narrow, density, near + torch.log(-torch.expm1(far - near)))


def _log_ndtr(z: Tensor) -> Tensor:
    """log(Phi(z)); the gradient of torch's own is lost far below."""
    far = z < _FAR
    below = torch.where(far, z, _FAR)
    asymptote = -0.5 * below.square() - torch.log(-below) - _LOG_SQRT_2PI
    return torch.where(far, asymptote, torch.special.log_ndtr(z.clamp(min=_FAR)))
