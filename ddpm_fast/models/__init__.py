"""Denoising networks. They stand apart: any callable of ``(x_t, t)`` may take their place."""

from .lightweight import LightweightUNet
from .unet import UNet

__all__ = ["LightweightUNet", "UNet"]
