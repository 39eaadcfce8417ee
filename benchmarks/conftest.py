"""How every benchmark is run: which of the grid, side by side with what, and what is recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import origin
from ddpm_fast.bench.timing import (
    Call,
    calls_per_round,
    clock,
    median_ratio,
    rounds_within,
    seconds_per_call,
)

Race = Callable[..., None]
SECONDS, SECONDS_IN_FULL = {"cpu": 0.7, "cuda": 0.4}, 3.0  # for each row
STATISTICS = ("median", "q1", "q3", "min", "max", "rounds", "iterations")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole grid, and longer at each row")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            return False
        return config.getoption("--full") or not item.get_closest_marker("full")

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture
def race(benchmark: Any, pytestconfig: pytest.Config) -> Race:
    """Times a contender with pytest-benchmark, in turns with others, and records the ratios."""

    def run(
        timed: Call,
        beside: Mapping[str, Call],
        *,
        device: torch.device,
        group: str,
        steps: int = 1,
        patience: int = 1,
        elements: int | None = None,
        moved: int | None = None,
        copied: int | None = None,
        **facts: Any,
    ) -> None:
        """Args:
        timed: the contender.
        beside: what else has a turn in each round: "native", and what else is a measure.
        device: where they work.
        group: the table of pytest-benchmark in which the contender stands.
        steps: how many steps a call is, of each of them.
        patience: how many times as long to measure as other rows.
        elements: of x_t.
        moved: bytes that a call must at least move, and
        copied: those that the call of ``beside["copy"]`` moves.
        facts: what tells this row from others.
        """
        seconds = SECONDS_IN_FULL if pytestconfig.getoption("--full") else SECONDS[device.type]
        benchmark.group = group
        if benchmark.disabled:
            benchmark.pedantic(timed)
            return
        over = in_turns(benchmark, timed, dict(beside), device, patience * seconds)
        a_call = benchmark.stats.stats.median
        measured = {"seconds_per_step": a_call / steps, "steps_per_sec": steps / a_call}
        if elements is not None:
            measured["elements"] = elements
            measured["ns_per_element"] = a_call / steps / elements * 1e9
        if moved is not None and copied is not None:
            measured["gb_per_sec"] = moved / a_call / 1e9
            measured["copy_share"] = moved / copied / over["copy"]
        benchmark.extra_info.update(facts, device=device.type, **measured, over=over)

    return run


def in_turns(
    benchmark: Any, timed: Call, others: dict[str, Call], device: torch.device, seconds: float
) -> dict[str, float]:
    """How many times as long as each of the others a call takes.

    Every round is a batch of its calls, timed by pytest-benchmark, and one of each of the others.
    """
    now = clock(device)
    calls = {call: calls_per_round(call, device) for call in (timed, *others.values())}
    times: dict[str, list[float]] = {name: [] for name in others}

    def turns_of_the_others() -> None:
        for name, call in others.items():
            times[name].append(seconds_per_call(call, calls[call], now))

    benchmark.pedantic(
        timed,
        rounds=rounds_within(seconds, calls, device),
        iterations=calls[timed],
        teardown=turns_of_the_others,
    )
    timed_calls = benchmark.stats.stats.data
    for values in times.values():
        del values[len(timed_calls) :]  # a round behind one more call, which is not timed
    return {name: median_ratio(timed_calls, values) for name, values in times.items()}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: Any) -> None:
    """The commit alone. A copy of a checkout, without its history, is told it by a variable."""
    found = {name: commit_info[name] for name in ("id", "time", "dirty")}
    if told := os.environ.get("DDPM_FAST_COMMIT"):
        found |= {"id": told, "time": None, "dirty": False}
    commit_info.clear()
    commit_info.update(found)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """What the results are read against, and nothing that names the machine or its owner."""
    machine_info.clear()
    machine_info.update(origin.machine_info())


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Results are committed: the statistics of each row, without the time of each round."""
    for row in output_json["benchmarks"]:
        row["stats"] = {name: row["stats"][name] for name in STATISTICS}
        for name in ("fullname", "param", "params", "options"):
            del row[name]
