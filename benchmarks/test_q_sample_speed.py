"""q_sample, the forward noising of a training batch, with noise that has yet to be drawn."""

from __future__ import annotations

import pytest
import torch

import contenders
from conftest import Race
from contenders import FORWARDS
from ddpm_fast.bench.checking import check_forward, check_our_forward
from ddpm_fast.bench.contenders import forward_problem, native_q_sample
from grid import Case, grid


@pytest.mark.parametrize(("case", "name"), grid(FORWARDS, ("noise",)))
def test_q_sample(race: Race, case: Case, name: str) -> None:
    problem = forward_problem(case.shape, **case.options())
    forward = FORWARDS[name].prepare(problem)
    check = check_our_forward if FORWARDS[name].drawn_by == "counter" else check_forward
    check(problem, forward)
    size = problem.x_start.numel() * problem.x_start.element_size()
    race(
        forward,
        {"native": native_q_sample(problem), "copy": contenders.copy(problem.x_start)},
        group=f"q_sample, {case.elements:,} {case.dtype} elements, {case.device}",
        op="q_sample",
        kind=case.kind,
        dtype=case.dtype,
        contender=name,
        device=torch.device(case.device),
        elements=case.elements,
        moved=problem.bytes,
        copied=2 * size,
    )
