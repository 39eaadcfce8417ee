"""The short benchmark behind ``ddpm-fast bench``; pytest runs the whole suite in ``benchmarks/``.

Both take their contenders from :mod:`.contenders`, which :mod:`.checking` finds right before
:mod:`.timing` compares them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ..models import LightweightUNet
from ..ops import serves_natively
from .checking import check_forward, check_loop, check_our_forward, check_step
from .contenders import (
    EAGER_FORWARDS,
    EAGER_STEPS,
    OUR_FORWARDS,
    OUR_LOOPS,
    OUR_STEPS,
    bare_network,
    forward_problem,
    loop_problem,
    step_problem,
)
from .timing import median_ratio, side_by_side

SHAPES = {3_072: (1, 3, 32, 32), 49_152: (16, 3, 32, 32), 3_145_728: (16, 3, 256, 256)}
LOOP_STEPS = 100


class Measured(NamedTuple):
    """A piece of work: each contender's median seconds, and how many times as long as native."""

    work: str
    size: str
    seconds: dict[str, float]
    over_native: dict[str, float]


def measure(
    device: torch.device,
    *,
    shapes: Mapping[int, Sequence[int]] = SHAPES,
    loop_steps: int = LOOP_STEPS,
    seconds: float = 2.0,
) -> Iterator[Measured]:
    """Verify and time the reverse step, q_sample and the loop: each for about so many seconds.

    Raises:
        RuntimeError: there are no compiled kernels for the device to compare with.
        WrongResult: a contender does not compute what the reference does.
    """
    serves_natively(device, "native")
    for noise, work in ((True, "reverse step"), (False, "  without noise")):
        for elements, shape in shapes.items():
            steps = _verified_steps(tuple(shape), noise, device)
            yield _measured(work, f"{elements:,}", side_by_side(steps, device, seconds))
    for elements, shape in shapes.items():
        forwards = _verified_forwards(tuple(shape), device)
        yield _measured("q_sample", f"{elements:,}", side_by_side(forwards, device, seconds))
    loops = _verified_loops(loop_steps, device)
    size = f"{loop_steps} steps"
    yield _measured("loop, three convolutions", size, side_by_side(loops, device, 2 * seconds))


def _measured(work: str, size: str, times: Mapping[str, list[float]]) -> Measured:
    return Measured(
        work,
        size,
        {name: median(rounds) for name, rounds in times.items()},
        {name: median_ratio(rounds, times["native"]) for name, rounds in times.items()},
    )


def _verified_steps(
    shape: tuple[int, ...], noise: bool, device: torch.device
) -> dict[str, Callable[[], object]]:
    problem = step_problem(shape, noise=noise, device=device)
    steps = {name: make(problem) for name, make in (EAGER_STEPS | OUR_STEPS).items()}
    for name, step in steps.items():
        check_step(problem, step, drawn_by="counter" if name in OUR_STEPS else "torch")
    return dict(steps)


def _verified_forwards(
    shape: tuple[int, ...], device: torch.device
) -> dict[str, Callable[[], object]]:
    problem = forward_problem(shape, device=device)
    forwards = {name: make(problem) for name, make in (EAGER_FORWARDS | OUR_FORWARDS).items()}
    for name, forward in forwards.items():
        check = check_our_forward if name in OUR_FORWARDS else check_forward
        check(problem, forward)
    return dict(forwards)


def _verified_loops(num_steps: int, device: torch.device) -> dict[str, Callable[[], object]]:
    problem = loop_problem(LightweightUNet(), (1, 3, 32, 32), num_steps, device=device)
    loops = {name: make(problem) for name, make in OUR_LOOPS.items()}
    for loop in loops.values():
        check_loop(problem, loop, drawn_by="counter")
    return {"bare network": bare_network(problem), **loops}


def table(results: Sequence[Measured]) -> str:
    """The results in columns: each time, and how many times as long as native it is."""
    columns = list(dict.fromkeys(name for result in results for name in result.seconds))
    lines = [f"{'':24}{'':>12}" + "".join(f"{name.replace('_', ' '):>20}" for name in columns)]
    for result in results:
        cells = "".join(f"{_cell(result, name):>20}" for name in columns)
        lines.append(f"{result.work:24}{result.size:>12}{cells}".rstrip())
    return "\n".join(lines)


def _cell(result: Measured, name: str) -> str:
    if name not in result.seconds:
        return ""
    return f"{format_seconds(result.seconds[name])} {result.over_native[name]:7.2f}"


def format_seconds(seconds: float) -> str:
    """With three digits or so, and the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on: the processor or GPU, and the versions."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{processor_name()}, {torch.get_num_threads()} threads"
    return {"ddpm_fast": version("ddpm_fast"), "torch": torch.__version__, "on": processor}


def processor_name() -> str:
    """The CPU's model, as Linux tells it, elsewhere as Python does, and its vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
