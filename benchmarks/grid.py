"""What is measured: sizes, dtypes and devices. Rows marked `full` are left out of the short run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from contenders import KINDS_OF
from ddpm_fast.bench.timing import clock

SHAPES = {
    3_072: (1, 3, 32, 32),
    49_152: (16, 3, 32, 32),
    1_048_576: (16, 4, 128, 128),
    3_145_728: (16, 3, 256, 256),
    12_582_912: (64, 3, 256, 256),
    # Beyond every cache of a GPU: 256 MiB in float32, in bfloat16, and 1 GiB in float32.
    67_108_864: (64, 4, 512, 512),
    134_217_728: (128, 4, 512, 512),
    268_435_456: (256, 4, 512, 512),
}
SIZES = {"cpu": list(SHAPES)[:5], "cuda": list(SHAPES)}
DTYPES = ("float32", "bfloat16")
KINDS = ("noise", "no_noise", "guided")


@dataclass(frozen=True)
class Case:
    """A size to measure an op at.

    Its kind is "noise", "no_noise", "guided" (with noise) or "bfloat16_network" (with noise).
    """

    elements: int
    dtype: str
    device: str
    kind: str = "noise"

    def __str__(self) -> str:
        return f"{self.kind}-{self.elements}-{self.dtype}-{self.device}"

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.elements]

    def options(self) -> dict[str, object]:
        return {"dtype": getattr(torch, self.dtype), "device": torch.device(self.device)}


# As the sampler steps with precision="bf16": the state stays float32.
BFLOAT16_NETWORK = Case(134_217_728, "float32", "cuda", "bfloat16_network")

# The short run: nearly every size on the CPU with noise, one or two of all else.
SHORT = {
    *(Case(elements, "float32", "cpu") for elements in SIZES["cpu"] if elements != 1_048_576),
    Case(3_072, "float32", "cpu", "no_noise"),
    Case(3_145_728, "float32", "cpu", "no_noise"),
    Case(49_152, "float32", "cpu", "guided"),
    Case(1_048_576, "float32", "cpu", "guided"),
    Case(3_072, "float32", "cuda"),
    Case(67_108_864, "float32", "cuda"),
    Case(134_217_728, "bfloat16", "cuda"),
    Case(67_108_864, "float32", "cuda", "no_noise"),
    Case(67_108_864, "float32", "cuda", "guided"),
    BFLOAT16_NETWORK,
}


def cases(kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    for device, kind, dtype in product(SIZES, kinds, DTYPES):
        for elements in SIZES[device]:
            yield Case(elements, dtype, device, kind)


def grid(contenders: Iterable[str], kinds: tuple[str, ...] = KINDS) -> list[Any]:
    """Every case with every contender that has a part in it."""
    return [
        row(case, name)
        for case in cases(kinds)
        for name in contenders
        if case.kind in KINDS_OF.get(name, KINDS)
    ]


def row(case: Case, name: str) -> Any:
    """One contender's part in one case."""
    return pytest.param(case, name, id=f"{case}-{name}", marks=marks(case.device, case in SHORT))


def marks(device: str, short: bool) -> list[pytest.MarkDecorator]:
    found = [] if short else [pytest.mark.full]
    if device == "cuda":
        found += [pytest.mark.cuda, pytest.mark.benchmark(timer=clock(torch.device(device)))]
    return found
