"""What an error of the network costs, and what weight its timestep gives it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

# Elementwise, called with reduction="none". Huber's is quadratic up to 1 and linear beyond.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """The weight of a loss at a signal-to-noise ratio: min(SNR, gamma) on the error of x_start.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4. The error of epsilon is SNR times that of
    x_start, and the error of v is SNR + 1 times, which the weight is divided by. At SNR = 0 the
    weight for epsilon is 1, its limit.

    Args:
        snr: abar / (1 - abar), of any shape, which the weight has too.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        gamma: 5 in the paper.

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    raise ValueError(
        f"prediction_type must be one of epsilon, sample, v_prediction; got {prediction_type!r}"
    )
