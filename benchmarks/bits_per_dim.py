"""What does a digit cost? Bits per dimension of the bundled model, on digits seen and not seen.

    OMP_NUM_THREADS=1 python -m benchmarks.bits_per_dim [--fresh] [--pictures 128]

Each run is one half of the digits and one number of steps, and is added to
benchmarks/results/bits-per-dim.json when it is done; those that are there are kept, so that this
can be stopped and taken up again. Then rewrites what stands between the markers in
docs/evaluation.md, and its plot in docs/images/.

The pictures are taken evenly from each half, the same for each number of steps, and labelled: the
bound is on p(picture | label).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ddpm_fast import load
from ddpm_fast.cli.eval.bpd import evenly
from ddpm_fast.cli.eval.pictures import batch_of
from ddpm_fast.data import digits
from ddpm_fast.likelihood import bits_per_dim

from .bits_per_dim_plot import draw
from .origin import commit_info, machine_info, origin
from .report import BITS_PER_DIM, ROOT, replace_between_markers
from .runs import Key, Run, Runs, completed

PARTS = ("held_out", "train")
STEPS = (5, 10, 20, 50, 100, 200, 1000)
LEVELS = 17
FINE = 10  # timesteps whose noise is smaller than half the step between two levels


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and rewrite the page; 0 if that could be done."""
    args = options(argv)
    results = args.root / "benchmarks" / "results" / BITS_PER_DIM
    wanted = [(part, steps) for steps, part in product(STEPS, PARTS)]
    measure = partial(measured, pictures=args.pictures)
    runs = completed(results, wanted, measure, key, fresh=args.fresh)

    draw(runs, independent_pixels(), args.root / "docs" / "images")
    page = args.root / "docs" / "evaluation.md"
    replace_between_markers(page, "bits-per-dim", report(runs))
    return 0


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """How much to measure, and where to write it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bits_per_dim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fresh", action="store_true", help="measure all anew")
    parser.add_argument("--pictures", type=int, default=128, help="of each half (default: 128)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to read and write")
    return parser.parse_args(argv)


def measured(part: str, steps: int, pictures: int) -> Run:
    """One run, with all that tells where its figures are from."""
    commit = commit_info()
    model, diffusion = load("digits")
    half = digits(part)
    images, labels = batch_of(half, evenly(len(half), pictures))
    found = bits_per_dim(
        model,
        diffusion,
        images,
        levels=LEVELS,
        class_labels=labels,
        num_steps=steps,
        seed=0,
        progress=sys.stderr.isatty(),
    )
    return {
        "part": part,
        "steps": steps,
        "pictures": len(images),
        "total": float(found.total.mean()),
        "standard_error": float(found.total.std() / math.sqrt(len(images))),
        "prior": float(found.prior.mean()),
        "timesteps": found.timesteps,
        "terms": [float(f"{term:.6g}") for term in found.terms.mean(dim=0)],
        "machine_info": machine_info(),
        "commit_info": commit,
    }


def independent_pixels() -> float:
    """Bits per dimension of the held-out digits without a network: each pixel by its frequencies.

    Those of its levels in the training half, each counted once more than it is seen.
    """
    train, held_out = (level_of(digits(part).images) for part in ("train", "held_out"))
    seen = one_hot(train, LEVELS).sum(dim=0) + 1  # [pixels, levels]
    cost = -(seen / seen.sum(dim=1, keepdim=True)).log2()
    return float(cost[torch.arange(len(cost)), held_out].mean())


def level_of(images: Tensor) -> Tensor:
    """int64 [N, pixels], from 0."""
    return ((images.flatten(1) + 1) / 2 * (LEVELS - 1)).round().long()


def key(run: Run) -> Key:
    """Which half, and its steps."""
    return run["part"], run["steps"]


def report(runs: Runs) -> str:
    """What the page says."""
    return f"{table(runs)}\n\n{late(runs)}\n\n{origin(runs.values())}"


def late(runs: Runs) -> str:
    """What the finest noise costs in the longest chain."""
    run = runs["held_out", STEPS[-1]]
    terms = dict(zip(run["timesteps"], run["terms"], strict=True))
    bits = sum(term for t, term in terms.items() if t < FINE)
    return (
        f"Of the {run['total']:.2f} bits of {STEPS[-1]} steps on held-out digits, {bits:.2f} "
        f"are those of the last {FINE}. All by {run['pictures']} pictures of each half, "
        "± one standard error over them."
    )


def table(runs: Runs) -> str:
    """Every chain's bound on either half, in Markdown, and what it is made of."""
    head = ["steps", "held-out", "train", "of held-out: L_T", "L_T-1 … L_1", "L_0"]
    lines = [head, ["---:"] * len(head)]
    for steps in STEPS:
        held_out, train = runs["held_out", steps], runs["train", steps]
        *kls, decoder = held_out["terms"]
        parts = [held_out["prior"], sum(kls), decoder]
        lines.append([f"{steps}", *map(_bound, (held_out, train)), *(f"{x:.3f}" for x in parts)])
    without = f"{independent_pixels():.3f}"
    lines.append(["*no network, pixel by pixel*", without, "", "", "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bound(run: Run) -> str:
    return f"{run['total']:.3f} ± {run['standard_error']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
