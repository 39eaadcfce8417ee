"""Runs diffusers' own tests of its DDPM and DDIM schedulers on the drop-in ones.

They are in its repository only, not in what pip installs, so take the tag of the installed version:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    python tests/diffusers_own.py diffusers

All of both test classes run; none is left out. One test of each, ``test_compatibles``, makes a
scheduler of diffusers that needs ``torchsde``: install that first. Exits with pytest's code.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from ddpm_fast.integrations.schedulers import FusedDDIMScheduler, FusedDDPMScheduler

TESTED = {
    "test_scheduler_ddpm.py::DDPMSchedulerTest": FusedDDPMScheduler,
    "test_scheduler_ddim.py::DDIMSchedulerTest": FusedDDIMScheduler,
}


class InTheirPlace:
    """A plugin of pytest: the tests' ``scheduler_classes`` become the drop-in ones."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        fused = {name.split("::")[1]: scheduler for name, scheduler in TESTED.items()}
        for item in items:
            assert isinstance(item, pytest.Function) and item.cls is not None
            item.cls.scheduler_classes = (fused[item.cls.__name__],)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of huggingface/diffusers")
    checkout = parser.parse_args().checkout.resolve()
    folder = checkout / "tests" / "schedulers"
    if not folder.is_dir():
        parser.error(f"{folder} is not there: is this a clone of diffusers?")
    tests = [f"{folder}/{name}" for name in TESTED]
    # Neither this repository's settings nor a cache in theirs.
    options = ["-c", os.devnull, "--rootdir", str(checkout), "-p", "no:cacheprovider"]
    return pytest.main([*tests, *options], plugins=[InTheirPlace()])


if __name__ == "__main__":
    raise SystemExit(main())
