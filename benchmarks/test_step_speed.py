"""One reverse step: with noise (DDPM), without (DDIM), and with classifier-free guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import contenders
from conftest import Race
from contenders import FLOORS, GRAPH_STEPS, STEPS
from ddpm_fast.bench.checking import check_step
from ddpm_fast.bench.contenders import StepProblem, native, step_problem
from grid import BFLOAT16_NETWORK, Case, grid, marks, row


def problem_of(case: Case) -> StepProblem:
    noise, guided = case.kind != "no_noise", case.kind == "guided"
    problem = step_problem(case.shape, noise=noise, guided=guided, **case.options())
    if case.kind != "bfloat16_network":
        return problem
    return replace(problem, model_output=problem.model_output.bfloat16())


def facts_of(case: Case, contender: str) -> dict[str, Any]:
    where = f"{case.elements:,} {case.dtype} elements, {case.device}"
    return {
        "group": f"reverse_step, {case.kind.replace('_', ' ')}, {where}",
        "op": "reverse_step",
        "kind": case.kind,
        "dtype": case.dtype,
        "contender": contender,
        "device": torch.device(case.device),
        "elements": case.elements,
    }


def beside(problem: StepProblem) -> dict[str, Any]:
    return {"native": native(problem), "copy": contenders.copy(problem.x_t)}


def size_of(problem: StepProblem) -> int:
    return problem.x_t.numel() * problem.x_t.element_size()


@pytest.mark.parametrize(("case", "name"), [*grid(STEPS), row(BFLOAT16_NETWORK, "native")])
def test_step(race: Race, case: Case, name: str) -> None:
    problem = problem_of(case)
    step = STEPS[name].prepare(problem)
    check_step(problem, step, drawn_by=STEPS[name].drawn_by)
    race(
        step,
        beside(problem),
        moved=problem.bytes,
        copied=2 * size_of(problem),
        **facts_of(case, name),
    )


@pytest.mark.parametrize(("case", "name"), grid(FLOORS, ("noise", "no_noise")))
def test_floor(race: Race, case: Case, name: str) -> None:
    problem = problem_of(case)
    make, tensors = FLOORS[name]
    race(
        make(problem),
        beside(problem),
        moved=tensors * size_of(problem),
        copied=2 * size_of(problem),
        **facts_of(case, name),
    )


@pytest.mark.parametrize(
    "case", [pytest.param(Case(3_072, "float32", "cuda"), marks=marks("cuda", short=True))]
)
def test_step_in_a_graph(race: Race, case: Case) -> None:
    problem = problem_of(case)
    step, steps_in_a_graph = native(problem), contenders.native_graph(problem)
    check_step(problem, step, drawn_by="counter")
    for _ in range(GRAPH_STEPS):
        x = step()
    torch.testing.assert_close(steps_in_a_graph(), x)
    race(
        steps_in_a_graph,
        {"native": lambda: [step() for _ in range(GRAPH_STEPS)]},
        steps=GRAPH_STEPS,
        **facts_of(case, "native_graph"),
    )
