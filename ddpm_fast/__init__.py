"""Fast sampling from denoising diffusion probabilistic models (Ho et al. 2020).

::

    from ddpm_fast import load, sample

    model, diffusion = load("digits")
    images = sample(model, (64, 1, 8, 8), diffusion=diffusion, seed=0)
"""

from importlib.metadata import version
from typing import Any

import torch

from . import _extension
from .checkpoint import load
from .continuous import ContinuousSampler
from .diffusion import GaussianDiffusion
from .intermediates import Intermediates
from .sampler import Sampler, sample, sample_progressive
from .solvers import StepTable

__all__ = [
    "ContinuousSampler",
    "GaussianDiffusion",
    "Intermediates",
    "Sampler",
    "StepTable",
    "info",
    "load",
    "sample",
    "sample_progressive",
]

__version__ = version("ddpm_fast")


def info() -> dict[str, Any]:
    """Which backend serves each kind of device, and why not the native one where it does not."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backends": {
            device: "native" if device in _extension.native_devices else "reference"
            for device in ("cpu", "cuda")
        },
        "reason": _extension.reason,
        "build": _extension.build_info,
    }
