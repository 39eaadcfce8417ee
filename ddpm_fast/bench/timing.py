"""Contenders measured side by side: in one process, in turns, by their medians.

A machine's speed drifts by more than the differences that matter. Calls that take turns drift
together, so the ratio of two in one round holds where neither time does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

# Calls between two looks at the clock go on for so long that the look itself does not count, on
# CUDA with its wait for the device, and that each contender finds caches and threads as its own
# calls leave them.
BATCH_SECONDS = {"cpu": 2e-2, "cuda": 1e-2}
MAX_CALLS = 1000
MIN_ROUNDS, MAX_ROUNDS = 5, 200


def clock(device: torch.device) -> Clock:
    """Seconds, read when the device has done all that it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def wait_and_read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wait_and_read


def seconds_per_call(call: Call, calls: int, now: Clock) -> float:
    """The mean over a batch of calls."""
    start = now()
    for _ in range(calls):
        call()
    return (now() - start) / calls


def calls_per_round(call: Call, device: torch.device) -> int:
    """How many calls make a batch; the first call, which may compile, is left out of it."""
    call()
    once = seconds_per_call(call, 1, clock(device))
    return max(1, min(MAX_CALLS, int(BATCH_SECONDS[device.type] / once)))


def rounds_within(seconds: float, calls: Mapping[Call, int], device: torch.device) -> int:
    """How many rounds, in each of which every contender has a batch of calls, fit into a time."""
    now = clock(device)
    one_round = sum(count * seconds_per_call(call, count, now) for call, count in calls.items())
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))


def side_by_side(
    contenders: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call of each contender, round by round; in each of them all take turns."""
    now = clock(device)
    calls = {call: calls_per_round(call, device) for call in contenders.values()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds_within(seconds, calls, device)):
        for name, call in contenders.items():
            times[name].append(seconds_per_call(call, calls[call], now))
    return times


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long as the other's a call takes: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(times, others, strict=True))
