"""The benchmark's own arithmetic, and that it refuses to time what is wrong. No test times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_fast import _extension, bench, cli
from ddpm_fast.bench import checking, contenders, timing
from ddpm_fast.bench.contenders import StepProblem
from ddpm_fast.models import LightweightUNet

CPU = torch.device("cpu")
SHAPE = (4, 3, 16, 16)

needs_native = pytest.mark.skipif(
    "cpu" not in _extension.native_devices, reason=f"no extension: {_extension.reason}"
)


class FakeClock:
    """Time passes only in the calls that are measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.seconds)

    def call(self, *durations: float) -> timing.Call:
        """Takes each duration in turn, and the last one ever after."""
        left = list(durations)

        def pass_time() -> None:
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return pass_time


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def test_the_first_call_is_left_out(fake_clock: FakeClock) -> None:
    once = timing.BATCH_SECONDS["cpu"] / 3.5
    assert timing.calls_per_round(fake_clock.call(60.0, once), CPU) == 3


@pytest.mark.parametrize(("once", "calls"), [(1.0, 1), (1e-9, timing.MAX_CALLS)])
def test_calls_per_round_are_bounded(fake_clock: FakeClock, once: float, calls: int) -> None:
    assert timing.calls_per_round(fake_clock.call(once), CPU) == calls


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.0, timing.MIN_ROUNDS), (6.0, 12), (1e9, timing.MAX_ROUNDS)]
)
def test_rounds_fit_into_the_time(fake_clock: FakeClock, seconds: float, rounds: int) -> None:
    calls = {fake_clock.call(0.1): 3, fake_clock.call(0.2): 1}
    assert timing.rounds_within(seconds, calls, CPU) == rounds


def test_calls_take_turns(fake_clock: FakeClock) -> None:
    order = []

    def noted(name: str, call: timing.Call) -> timing.Call:
        return lambda: (order.append(name), call())

    # Once to compile, once to count and once to plan; then five rounds.
    slow = fake_clock.call(9, 2, 2, 2, 3, 100, 2)
    found = timing.side_by_side(
        {"slow": noted("slow", slow), "fast": noted("fast", fake_clock.call(1))}, CPU, 0
    )
    assert found["slow"] == pytest.approx([2, 3, 100, 2, 2])
    assert found["fast"] == pytest.approx([1] * 5)
    assert order[-4:] == ["slow", "fast", "slow", "fast"]


def test_a_drifting_machine_leaves_the_ratio_alone() -> None:
    """Twice as long in each round but one, on a machine whose speed goes up and down."""
    others = [1.0, 1.0, 3.0, 4.0, 5.0]
    assert timing.median_ratio([2.0, 2.0, 6.0, 8.0, 500.0], others) == 2
    with pytest.raises(ValueError):
        timing.median_ratio([2.0], others)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("name", ["textbook", "in_place"])
def test_eager_steps_are_right(name: str, noise: bool, guided: bool) -> None:
    problem = contenders.step_problem(SHAPE, noise=noise, guided=guided)
    step = contenders.EAGER_STEPS[name](problem)
    checking.check_step(problem, step, drawn_by="torch")
    checking.check_step(problem, step, drawn_by="unknown")


@pytest.fixture
def problem() -> StepProblem:
    return contenders.step_problem(SHAPE)


def altered(problem: StepProblem, scale: float, shift: float = 0.0) -> contenders.Step:
    step = contenders.textbook(problem)

    def wrong() -> Tensor:
        return step().mul_(scale).add_(shift)

    return wrong


@pytest.mark.parametrize("drawn_by", ["torch", "unknown"])
@pytest.mark.parametrize(("scale", "shift"), [(1.2, 0), (1, 0.05), (torch.nan, 0)])
def test_wrong_steps_are_refused(
    problem: StepProblem, drawn_by: str, scale: float, shift: float
) -> None:
    with pytest.raises(checking.WrongResult):
        checking.check_step(problem, altered(problem, scale, shift), drawn_by=drawn_by)


def test_noise_that_is_not_ours_is_refused(problem: StepProblem) -> None:
    with pytest.raises(checking.WrongResult):
        checking.check_step(problem, contenders.textbook(problem), drawn_by="counter")


def test_q_sample_is_checked() -> None:
    problem = contenders.forward_problem(SHAPE)
    eager, ours = contenders.eager_q_sample(problem), contenders.reference_q_sample(problem)
    checking.check_forward(problem, eager)
    checking.check_our_forward(problem, ours)
    with pytest.raises(checking.WrongResult):
        checking.check_our_forward(problem, eager)
    with pytest.raises(checking.WrongResult):
        checking.check_forward(problem, lambda: (ours()[0] * 1.01, ours()[1]))


@pytest.mark.usefixtures("one_thread")
def test_loops_are_checked() -> None:
    problem = contenders.loop_problem(LightweightUNet(), (1, 3, 8, 8), 25, device=CPU)
    loop = contenders.reference_loop(problem)
    checking.check_loop(problem, loop, drawn_by="counter")
    for wrong, drawn_by in ((lambda: loop() * 1.01, "counter"), (loop, "torch")):
        with pytest.raises(checking.WrongResult):
            checking.check_loop(problem, wrong, drawn_by=drawn_by)


def test_the_bare_network_is_called_once_a_step() -> None:
    network = LightweightUNet()
    calls: list[object] = []
    network.register_forward_hook(lambda *_: calls.append(None))
    problem = contenders.loop_problem(network, (1, 3, 8, 8), 25, device=CPU)
    contenders.bare_network(problem)()
    assert len(calls) == 25


@needs_native
@pytest.mark.usefixtures("one_thread")
def test_measure_goes_through_everything() -> None:
    shapes = {768: (1, 3, 16, 16)}
    results = list(bench.measure(CPU, shapes=shapes, loop_steps=25, seconds=0))
    assert [result.work for result in results] == [
        "reverse step",
        "  without noise",
        "q_sample",
        "loop, three convolutions",
    ]
    assert all(value > 0 for result in results for value in result.seconds.values())
    assert all(result.over_native.keys() == result.seconds.keys() for result in results)
    assert all(result.over_native["native"] == 1 for result in results)


STEP = bench.Measured(
    "reverse step",
    "3,072",
    {"textbook": 3e-5, "native": 1e-5},
    {"textbook": 3.1, "native": 1.0},
)


@needs_native
def test_a_row_is_recorded(tmp_path: Path) -> None:
    """By pytest-benchmark, with many calls a round."""
    path = tmp_path / "rows.json"
    row = "test_q_sample_speed.py::test_q_sample[noise-3072-float32-cpu-in_place]"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", f"benchmarks/{row}", "-q", "-p", "no:cacheprovider"]
        + ["--benchmark-only", f"--benchmark-json={path}"],
        cwd=Path(__file__).parent.parent,
        # Beside other tests of pytest-xdist, whose workers go by a variable, nothing is timed.
        env={name: value for name, value in os.environ.items() if "XDIST" not in name},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (recorded,) = json.loads(path.read_text())["benchmarks"]
    assert recorded["stats"]["iterations"] > 1
    over = recorded["extra_info"]["over"]
    assert over.keys() == {"native", "copy"} and all(value > 0 for value in over.values())


def test_table() -> None:
    results = [
        STEP,
        bench.Measured(
            "loop",
            "100 steps",
            {"bare network": 0.5, "native": 1.0},
            {"bare network": 0.5, "native": 1.0},
        ),
    ]
    head, first, second = bench.table(results).splitlines()
    assert head.split() == ["textbook", "native", "bare", "network"]
    assert first.split() == ["reverse", "step", "3,072", *["30", "us", "3.10", "10", "us", "1.00"]]
    assert second.split() == ["loop", "100", "steps", *["1", "s", "1.00", "500", "ms", "0.50"]]
    assert second.index("500 ms") > first.rindex("1.00") > head.index("native")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench, "measure", lambda device: iter([STEP]))
    yield


@needs_native
def test_the_command(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--device", "cpu", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed.splitlines()[0]
    assert "reverse step" in printed and "3.10" in printed
    saved = json.loads(path.read_text())
    assert saved["results"] == [STEP._asdict()]
    assert saved["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (".", "--json . is a folder; name the file to write"),
        ("no/bench.json", "--json no/bench.json: cannot write in no: No such file or directory"),
    ],
)
def test_the_command_finds_out_first_whether_it_can_write(
    path: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", pytest.fail)
    assert cli.main(["bench", "--device", "cpu", "--json", path]) == 2
    assert capsys.readouterr().err == f"ddpm-fast: error: {sentence}\n"


def test_the_command_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_extension, "native_devices", frozenset())
    assert cli.main(["bench", "--device", "cpu"]) == 2
    assert "error: backend 'native' cannot serve cpu tensors" in capsys.readouterr().err
