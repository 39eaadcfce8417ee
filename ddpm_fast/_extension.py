"""Loads the compiled kernels, or says why it cannot.

Importing ``ddpm_fast._C`` registers the operators ``torch.ops.ddpm_fast.*``. An extension serves
only the torch it was compiled against; with another it may not load, or load and crash. So the
build leaves a record beside ``_C``, which is compared with the running torch before ``_C`` is
imported. Nothing here raises for want of kernels, and nothing warns: ``reason`` tells the caller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def _remedy(kernels: str | None = None) -> str:
    setting = f"DDPM_FAST_BUILD={kernels} " if kernels else ""
    command = f"{setting}pip install --force-reinstall --no-deps ."
    return f"to build it anew, run `{command}` in a checkout of ddpm_fast"


def explain_mismatch(record: Mapping[str, str], torch_version: str, torch_cuda: str) -> str | None:
    """Say why an extension does not fit this torch.

    Args:
        record: what the build left beside the extension: "torch" and "cuda", the versions of the
            torch it was compiled against ("cuda" is "" for a torch without CUDA).
        torch_version: ``torch.__version__`` now, such as "2.13.0+cpu".
        torch_cuda: ``torch.version.cuda`` now, "" where it is None.

    Returns:
        One clause that names both builds, or None where they fit: the same major.minor version of
        torch, and the same major version of CUDA or both without.
    """

    def binary_interface(version: str, cuda: str) -> tuple[list[str], str]:
        return version.split("+")[0].split(".")[:2], cuda.split(".")[0]

    def name(version: str, cuda: str) -> str:
        return f"torch {version} ({f'CUDA {cuda}' if cuda else 'without CUDA'})"

    built, running = (record["torch"], record["cuda"]), (torch_version, torch_cuda)
    if binary_interface(*built) == binary_interface(*running):
        return None
    return f"the extension was compiled against {name(*built)}, but this is {name(*running)}"


def _load() -> tuple[Any, dict[str, str], str | None]:
    """Import ``_C``; give it, its build_info() and, in one sentence, what is missing."""
    switch = os.environ.get("DDPM_FAST_EXTENSION", "auto")
    if switch not in ("auto", "off"):
        raise ValueError(f"DDPM_FAST_EXTENSION must be one of auto, off; got {switch!r}")
    if switch == "off":
        return None, {}, "the extension is hidden by DDPM_FAST_EXTENSION=off"
    found = find_spec("ddpm_fast._C")
    if found is None or found.origin is None:
        return None, {}, f"ddpm_fast was installed without its extension; {_remedy('cpu')}"
    record_path = Path(found.origin).with_suffix(".json")
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        mismatch = explain_mismatch(record, torch.__version__, torch.version.cuda or "")
    except (OSError, ValueError, TypeError, KeyError):
        mismatch = f"the extension lacks the record of its build, {record_path.name}"
    if mismatch:
        return None, {}, f"{mismatch}; {_remedy()}"
    try:
        module = import_module("ddpm_fast._C")
        info: dict[str, str] = module.build_info()
    except ImportError as error:
        return None, {}, f"the extension does not load ({error}); {_remedy()}"
    if torch.version.cuda and not info["cuda"]:
        return module, info, f"the extension was built without CUDA kernels; {_remedy('cuda')}"
    return module, info, None


module, build_info, reason = _load()
native_devices: frozenset[str] = frozenset(
    [] if not build_info else ["cpu", "cuda"] if build_info["cuda"] else ["cpu"]
)
