"""A denoising network of three convolutions: the smallest one that has the right shapes."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .pictures import check_pictures

torch.fx.wrap("check_pictures")  # else a trace could not pass its question


class LightweightUNet(nn.Module):
    """Three 3x3 convolutions with ReLU between them: 3 -> 64 -> 64 -> 3 channels by default.

    It is meant for smoke tests and for measuring what the sampler costs when the network costs
    next to nothing. It ignores the timestep, from which follows:

    - one and the same function must denoise every noise level, so it can at best predict the
      average over all of them; the loss stays high however long it is trained;
    - each output pixel sees a 7x7 neighbourhood and nothing else, so there is no global structure;
    - samples drawn with it are coloured noise or flat areas, never pictures. Use :class:`UNet` for
      those.

    ``conv1``, ``conv2`` and ``conv3`` are plain convolutions with bias: a ``state_dict`` holding
    ``conv1.weight`` ... ``conv3.bias`` of these shapes loads.

    Args:
        in_channels: of x_t.
        hidden_channels: between the convolutions.
        out_channels: of the prediction.
    """

    def __init__(
        self, in_channels: int = 3, hidden_channels: int = 64, out_channels: int = 3
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.out_channels = out_channels
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, kernel_size=3, padding=1)

    def config(self) -> dict[str, Any]:
        """The keyword arguments that rebuild this network, as JSON-able values."""
        return {
            "in_channels": self.in_channels,
            "hidden_channels": self.hidden_channels,
            "out_channels": self.out_channels,
        }

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map ``x`` [N, in_channels, H, W] to [N, out_channels, H, W], whatever ``t`` is.

        Raises:
            ValueError: another number of channels or of dimensions.
        """
        check_pictures("LightweightUNet", x, self.in_channels)
        h = F.relu(self.conv1(x))
        h = F.relu(self.conv2(h))
        out: Tensor = self.conv3(h)
        return out
