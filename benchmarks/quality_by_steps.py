"""How few steps do good samples take? The figures of benchmarks.quality, by sampler and steps.

    python -m benchmarks.quality_by_steps [--fresh]

Each run is `python -m benchmarks.quality --sampler NAME --steps N`, and is added to
benchmarks/results/quality-by-steps.json when it is done; those that are there are kept, so that
this can be stopped and taken up again. Then rewrites what stands between the markers in
docs/samplers.md, and its plot and its picture in docs/images/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .origin import commit_info, machine_info, origin
from .quality import MAX_FRECHET_RATIO, MIN_LABELLED, MIN_NEIGHBOUR_RATIO, draw_samples, measure
from .quality import options as quality_options
from .quality_plots import draw
from .report import QUALITY_BY_STEPS, ROOT, replace_between_markers
from .runs import Key, Run, Runs, completed

SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
STEPS = (5, 10, 20, 50, 1000)

# The columns of the page: a figure's name in the results, and its bound.
COLUMNS = {
    "labelled as asked": f"at least {100 * MIN_LABELLED:g} %",
    "  by another classifier": "",
    "Fréchet distance": f"at most {MAX_FRECHET_RATIO}",
    "  to the training half": "",
    "nearest neighbour": f"at least {MIN_NEIGHBOUR_RATIO}",
}
FEW, LABELLED_IN_FEW = ("dpmpp_2m", 20), 0.96


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and rewrite the page; 0 if that could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_by_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fresh", action="store_true", help="measure all anew")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to read and write")
    args = parser.parse_args(argv)

    results = args.root / "benchmarks" / "results" / QUALITY_BY_STEPS
    wanted = [(sampler, steps) for steps, sampler in product(STEPS, SAMPLERS)]
    runs = completed(results, wanted, measured, key, fresh=args.fresh)

    draw(runs, args.root / "docs" / "images")
    page = args.root / "docs" / "samplers.md"
    replace_between_markers(page, "target", target(runs))
    replace_between_markers(page, "quality", f"{table(runs)}\n\n{origin(runs.values())}")
    return 0


def measured(sampler: str, steps: int) -> Run:
    """One run, with all that tells where its figures are from."""
    commit = commit_info()
    options = quality_options(["--sampler", sampler, "--steps", str(steps)])
    figures = measure(*draw_samples(options), seed=options.seed)
    return {
        "options": vars(options),
        "figures": {figure.name: figure._asdict() for figure in figures},
        "machine_info": machine_info(),
        "commit_info": commit,
    }


def key(run: Run) -> Key:
    """Its sampler and steps."""
    return run["options"]["sampler"], run["options"]["steps"]


def target(runs: Runs) -> str:
    """What few steps are to do, and what they did."""
    sampler, steps = FEW
    value = runs[FEW]["figures"]["labelled as asked"]["value"]
    verdict = "met" if value >= LABELLED_IN_FEW else "**missed**"
    return (
        f"Target: of 1,000 digits drawn by `{sampler}` in {steps} steps, at least "
        f"{100 * LABELLED_IN_FEW:g} % are labelled as asked. "
        f"Measured: {100 * value:.1f} %, {verdict}."
    )


def table(runs: Runs) -> str:
    """Every run's figures, in Markdown; those that miss their bound say so."""
    head = ["sampler", "steps", *(name.strip() for name in COLUMNS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], ["*bound*", "", *COLUMNS.values()]]
    for sampler, steps in product(SAMPLERS, STEPS):
        figures = runs[sampler, steps]["figures"]
        lines.append([f"`{sampler}`", f"{steps}", *(_cell(figures[name]) for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(figure: dict[str, Any]) -> str:
    is_share = figure["name"] in ("labelled as asked", "  by another classifier")
    value = f"{100 * figure['value']:.1f} %" if is_share else f"{figure['value']:.3f}"
    return value if figure["met"] else f"{value} **missed**"


if __name__ == "__main__":
    sys.exit(main())
