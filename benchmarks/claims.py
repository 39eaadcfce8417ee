"""What the kernels are to show: each claim is a bound on a ratio, held against the results.

Where a claim spans several rows, the worst of them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .rows import Results, Row

Measure = Callable[[Row], float]


def speed_up(row: Row) -> float:
    """How many times faster the native call is than this contender."""
    return float(row["over"]["native"])


def native_over(row: Row) -> float:
    """The native call's time over this contender's."""
    return 1 / speed_up(row)


def over_bare_network(row: Row) -> float:
    """The loop's time over that of the network alone."""
    return float(row["over"]["bare_network"])


def copy_share(row: Row) -> float:
    """Bandwidth over that of a copy in the same run."""
    return float(row["copy_share"])


def microseconds(row: Row) -> float:
    """The time of a step."""
    return float(row["seconds_per_step"]) * 1e6


TIMES, SHARE, MICROSECONDS = "×", "%", "µs"


class Claim(NamedTuple):
    """A bound on what ``measure`` finds in the ``rows`` that have these values."""

    text: str
    device: str
    rows: dict[str, Any]
    measure: Measure
    bound: float
    at_most: bool = False
    goal: float | None = None
    unit: str = TIMES

    def measured(self, results: Results) -> float | None:
        """The worst of the rows, or None where there are none."""
        values = [self.measure(row) for row in results.find(**self.rows)]
        return (max if self.at_most else min)(values) if values else None

    def target(self) -> str:
        """The bound, in words."""
        text = f"{'at most' if self.at_most else 'at least'} {self.show(self.bound)}"
        return text if self.goal is None else f"{text} (goal {self.show(self.goal)})"

    def met(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def show(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == SHARE:
            return f"{100 * value:.3g} %"
        return f"{value:.4g}{self.unit if self.unit == TIMES else f' {self.unit}'}"


def between(least: int, most: int) -> Callable[[int], bool]:
    """Elements or batches from ``least`` to ``most``."""
    return lambda value: least <= value <= most


def any_of(*names: str) -> Callable[[str], bool]:
    """One of these contenders."""
    return lambda name: name in names


SMALL, MEDIUM, MILLION, LARGE, HUGE = 3_072, 49_152, 1_048_576, 3_145_728, 67_108_864
END = 1 << 40
NOISE = {"op": "reverse_step", "kind": "noise", "dtype": "float32"}
LOOP = {"op": "loop", "network": "three_convolutions", "resolution": 32}
WHERE = {"cpu": "CPU", "cuda": "GPU"}


def step_claim(text: str, contender: Any, elements: Any, bound: float, **more: Any) -> Claim:
    """Of the CPU's reverse step with noise."""
    rows = NOISE | {"contender": contender, "elements": elements}
    return Claim(f"reverse step, {text}", "cpu", rows, speed_up, bound, **more)


FROM_MEDIUM, FROM_LARGE = between(MEDIUM, END), between(LARGE, END)

CLAIMS = [
    step_claim("against eager as textbooks write it, 49 k", "textbook", MEDIUM, 5.5, goal=7),
    step_claim("against eager as textbooks write it, 3 M up", "textbook", FROM_LARGE, 10, goal=15),
    step_claim("against eager in place, 49 k up", "in_place", FROM_MEDIUM, 5, goal=7),
    step_claim("against diffusers, 49 k", "diffusers", MEDIUM, 8),
    step_claim("against diffusers, 3 M up", "diffusers", FROM_LARGE, 11),
    step_claim("against torch.compile, 49 k up", "compiled", FROM_MEDIUM, 20),
    step_claim("against torch.randn alone, 49 k up", "randn", FROM_MEDIUM, 4.2, goal=5.5),
    Claim(
        "reverse step without noise, time over torch.add's, 3 M",
        "cpu",
        NOISE | {"kind": "no_noise", "contender": "add", "elements": LARGE},
        native_over,
        1.3,
        at_most=True,
    ),
    step_claim("against eager as textbooks write it, 3 k", "textbook", SMALL, 3),
    step_claim("against eager in place, 3 k", "in_place", SMALL, 3),
    step_claim("against diffusers, 3 k", "diffusers", SMALL, 10),
    *(
        Claim(
            f"guided reverse step, against {name}, 1 M",
            "cpu",
            NOISE | {"kind": "guided", "contender": contender, "elements": MILLION},
            speed_up,
            2,
        )
        for name, contender in (
            ("eager in place", "in_place"),
            ("guidance by torch.lerp before the op", "native_after_lerp"),
        )
    ),
    Claim(
        "q_sample against eager, 49 k up",
        "cpu",
        {"op": "q_sample", "dtype": "float32", "contender": "in_place", "elements": FROM_MEDIUM},
        speed_up,
        4,
    ),
    Claim(
        "loop, three convolutions, batch 1, time over the bare network's",
        "cpu",
        LOOP | {"batch": 1, "contender": "native"},
        over_bare_network,
        1.03,
        at_most=True,
    ),
    Claim(
        "loop, three convolutions, batch 1, against diffusers",
        "cpu",
        LOOP | {"batch": 1, "contender": "diffusers"},
        speed_up,
        1.25,
    ),
    Claim(
        "loop, three convolutions, batch 1, against lucidrains",
        "cpu",
        LOOP | {"batch": 1, "contender": "lucidrains"},
        speed_up,
        1.15,
    ),
    Claim(
        "training of the digits, time over the best of plain PyTorch's and lucidrains'",
        "cpu",
        {"op": "train", "contender": any_of("plain", "plain_fused", "lucidrains")},
        native_over,
        1.0,
        at_most=True,
    ),
    Claim(
        "reverse step, float32, 256 MiB up, share of the copy bandwidth",
        "cuda",
        NOISE | {"contender": "native", "elements": between(HUGE, END)},
        copy_share,
        0.92,
        goal=0.97,
        unit=SHARE,
    ),
    Claim(
        "reverse step, bfloat16, 256 MiB up, share of the copy bandwidth",
        "cuda",
        NOISE | {"dtype": "bfloat16", "contender": "native", "elements": between(2 * HUGE, END)},
        copy_share,
        0.85,
        unit=SHARE,
    ),
    Claim(
        "reverse step, float32 beside a bfloat16 network, 512 MiB, share of the copy bandwidth",
        "cuda",
        NOISE | {"kind": "bfloat16_network", "contender": "native"},
        copy_share,
        0.92,
        unit=SHARE,
    ),
    *(
        Claim(
            f"reverse step, float32, 256 MiB, against {name}",
            "cuda",
            NOISE | {"contender": contender, "elements": HUGE},
            speed_up,
            bound,
        )
        for name, contender, bound in (
            ("eager as textbooks write it", "textbook", 6),
            ("eager in place", "in_place", 6),
            ("diffusers", "diffusers", 8),
            ("torch.compile", any_of("compiled", "compiled_after_randn"), 1.15),
        )
    ),
    Claim(
        "one step in a replayed graph, 3 k",
        "cuda",
        NOISE | {"contender": "native_graph", "elements": SMALL},
        microseconds,
        3,
        at_most=True,
        unit=MICROSECONDS,
    ),
    Claim(
        "loop, three convolutions, batch 1 to 64, time over the bare network's graph",
        "cuda",
        LOOP | {"batch": between(1, 64), "contender": "native"},
        over_bare_network,
        1.05,
        at_most=True,
    ),
    Claim(
        "loop, three convolutions, batch 1 to 16, against diffusers and lucidrains",
        "cuda",
        LOOP | {"batch": between(1, 16), "contender": any_of("diffusers", "lucidrains")},
        speed_up,
        4,
    ),
    Claim(
        "the paper's U-Net in bfloat16 against diffusers",
        "cuda",
        {"op": "loop", "network": "paper_unet_bf16", "contender": "diffusers"},
        speed_up,
        1.5,
    ),
]


def claims_table(results: Mapping[str, Results]) -> str:
    """Every claim with its target and what was measured, in Markdown."""
    lines = ["| | | target | measured | |", "| --- | --- | --- | --- | --- |"]
    for claim in CLAIMS:
        part = results.get(claim.device)
        value = claim.measured(part) if part else None
        if value is not None:
            cells = [claim.show(value), "met" if claim.met(value) else "**missed**"]
        else:
            cells = ["", "unmeasured" if part else f"unmeasured (no {WHERE[claim.device]})"]
        lines.append(
            f"| {WHERE[claim.device]} | {claim.text} | {claim.target()} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)
