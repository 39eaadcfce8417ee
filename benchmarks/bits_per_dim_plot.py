"""Bits per dimension as a picture, for docs/evaluation.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import plots  # noqa: F401 (its look)
from .runs import Runs

NO_NETWORK = "held-out digits without a network, pixel by pixel"
STYLES = {"held_out": ("held-out digits", "#D55E00"), "train": ("training digits", "#0072B2")}


def draw(runs: Runs, independent: float, folder: Path) -> None:
    """The picture, as PNG."""
    figure = bits_per_dim(runs, independent)
    figure.savefig(folder / "bits-per-dim.png", metadata={"Software": None})
    plt.close(figure)


def bits_per_dim(runs: Runs, independent: float) -> Figure:
    """The terms of the longest chain, and the bound of each, beside that of independent pixels."""
    counts = sorted({steps for _, steps in runs})
    figure, (terms, totals) = plt.subplots(1, 2, figsize=(11, 4.1), width_ratios=(3, 2))
    for part, (label, colour) in STYLES.items():
        longest = runs[part, counts[-1]]
        # Timesteps count from 0, which has no place on a logarithmic axis.
        times = [t + 1 for t in longest["timesteps"]]
        terms.plot(times, longest["terms"], color=colour, label=label, linewidth=1.2)
        bounds = [runs[part, steps]["total"] for steps in counts]
        errors = [2 * runs[part, steps]["standard_error"] for steps in counts]
        totals.errorbar(
            counts, bounds, errors, color=colour, label=label, marker="o", markersize=5, capsize=3
        )
    _titled(terms, f"Terms of the bound, {counts[-1]} steps", "bits per dimension")
    terms.set(xscale="log", yscale="log", xlabel="timestep, counted from 1: from data to noise")
    decoder = runs["held_out", counts[-1]]["terms"][-1]
    terms.annotate("the decoder, L₀", (1, decoder), xytext=(8, -3), textcoords="offset points")
    _titled(
        totals, "The bound, by the length of the chain", "bits per dimension ± 2 standard errors"
    )
    totals.axhline(independent, color="#555555", linewidth=1, linestyle="--", label=NO_NETWORK)
    totals.set(xscale="log", xlabel="steps", ylim=(0, None))
    totals.xaxis.set_major_locator(FixedLocator(counts))
    for axes in (terms, totals):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    totals.xaxis.set_minor_locator(NullLocator())
    handles, labels = totals.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3)
    return figure


def _titled(axes: Axes, title: str, measure: str) -> None:
    axes.set_title(f"{title}\n", loc="left")
    axes.text(0, 1.02, measure, transform=axes.transAxes, color="#555555")
    axes.grid(axis="y")
