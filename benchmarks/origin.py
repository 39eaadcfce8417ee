"""Where results come from: what they are to be read against, and nothing that names a machine or
its owner."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.bench import processor_name

ROOT = Path(__file__).parent.parent
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


def commit_info() -> dict[str, Any]:
    """The commit, and whether what figures depend on has changes."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()

    dirty = git("status", "--porcelain", "--", "ddpm_fast", "csrc", "benchmarks/*.py")
    return {"id": git("rev-parse", "HEAD"), "dirty": bool(dirty)}


def origin(runs: Iterable[dict[str, Any]]) -> str:
    """Where the figures are from: one line for each commit and machine."""
    return "\n".join(dict.fromkeys(_origin(run) for run in runs))


def _origin(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    changed = " and changes" if commit["dirty"] else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return (
        f"Measured on {machine['cpu']}, {threads}; torch "
        f"{machine['versions']['torch']}; commit {commit['id'][:10]}{changed}."
    )
