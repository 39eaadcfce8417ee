"""Where results come from: what they are to be read against, and nothing that names a machine or
its owner."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ddpm_fast.bench import processor_name

PACKAGES = ("ddpm_fast", "torch", "diffusers", "denoising-diffusion-pytorch")


def machine_info() -> dict[str, Any]:
    """The processors, and the versions of what ran on them."""
    return {
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
