"""Quality against steps as pictures, for docs/samplers.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)
from torch import Tensor
from torch.nn.functional import pad

from ddpm_fast import load, sample

from . import plots  # noqa: F401 (its look)
from .quality import MAX_FRECHET_RATIO, MIN_LABELLED, MIN_NEIGHBOUR_RATIO
from .runs import Runs

STYLES = {
    "ddpm": ("DDPM", "#0072B2", "o"),
    "ddim": ("DDIM", "#E69F00", "s"),
    "dpmpp_2m": ("DPM-Solver++(2M)", "#D55E00", "D"),
}
PANELS = {
    "labelled as asked": ("Labelled as asked", "share, higher is better", MIN_LABELLED),
    "Fréchet distance": (
        "Fréchet distance",
        "over that of real digits, lower is better",
        MAX_FRECHET_RATIO,
    ),
    "nearest neighbour": (
        "Distance to the training digits",
        "over that of real digits, higher is newer",
        MIN_NEIGHBOUR_RATIO,
    ),
}


def draw(runs: Runs, folder: Path) -> None:
    """Both pictures, as PNG."""
    pictures = {
        "quality-against-steps": quality_against_steps(runs),
        "samplers-by-steps": samplers_by_steps(runs),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)


def quality_against_steps(runs: Runs) -> Figure:
    """The three figures that have a bound, over the number of steps."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9))
    for axes, (name, (title, measure, bound)) in zip(panels, PANELS.items(), strict=True):
        for sampler, (label, colour, marker) in STYLES.items():
            steps = sorted(steps for found, steps in runs if found == sampler)
            values = [runs[sampler, count]["figures"][name]["value"] for count in steps]
            axes.plot(steps, values, label=label, color=colour, marker=marker, markersize=5)
        is_share = name == "labelled as asked"
        real = next(iter(runs.values()))["figures"][name]["real"] if is_share else 1.0
        _line(axes, bound, "bound", "--", "black")
        _line(axes, real, "real digits", ":", "#555555")
        _steps_axis(axes, sorted({steps for _, steps in runs}))
        if is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.yaxis.set_major_locator(MultipleLocator(0.01))
        axes.margins(y=0.12)
        axes.grid(axis="y")
        axes.set_title(f"{title}\n", loc="left")
        axes.text(0, 1.02, measure, transform=axes.transAxes, color="#555555")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _line(axes: Axes, value: float, label: str, style: str, colour: str) -> None:
    axes.axhline(value, color=colour, linewidth=1, linestyle=style, label=label, zorder=1)


def _steps_axis(axes: Axes, steps: list[int]) -> None:
    axes.set(xscale="log", xlabel="steps")
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def samplers_by_steps(runs: Runs) -> Figure:
    """A digit of each class by every sampler in every number of steps, all from the same noise."""
    counts = sorted({steps for _, steps in runs})
    names = [f"{steps} steps" for steps in counts]
    figure, panels = plt.subplots(len(STYLES), 1, figsize=(5.2, 7.9))
    for axes, (sampler, (label, _, _)) in zip(panels, STYLES.items(), strict=True):
        pictures = torch.stack([ten_digits(sampler, steps) for steps in counts])
        # A frame of paper around each digit; then [rows * height, digits * width].
        framed = pad(pictures.squeeze(2), (1, 1, 1, 1), value=-1)
        rows, digits, height, width = framed.shape
        grid = framed.permute(0, 2, 1, 3).reshape(rows * height, digits * width)
        axes.imshow(grid, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(label)
        axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(rows)], names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def ten_digits(sampler: str, steps: int) -> Tensor:
    """One of each class, ``[10, 1, 8, 8]``, seed 0, no guidance."""
    model, diffusion = load("digits")
    return sample(
        model,
        (10, 1, 8, 8),
        diffusion=diffusion,
        sampler=sampler,
        num_steps=steps,
        seed=0,
        class_labels=range(10),
    )
