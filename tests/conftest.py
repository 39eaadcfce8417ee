"""Fixtures for all tests: which backend, and on which device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ddpm_fast import _extension

# The same examples on every run, and no deadline: other work may share the machine.
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=150)
settings.load_profile("quick")

# The tolerances are float32's.
torch.backends.cudnn.allow_tf32 = False

needs_native = pytest.mark.skipif(
    not _extension.native_devices, reason=f"no extension: {_extension.reason}"
)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "native" and device.type not in _extension.native_devices:
        pytest.skip(f"no native backend for {device}: {_extension.reason}")
    return str(request.param)


@pytest.fixture
def native(device: torch.device) -> str:
    if device.type not in _extension.native_devices:
        pytest.skip(f"no native backend for {device}: {_extension.reason}")
    return "native"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it the host must not wait for the GPU, or torch raises an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
