"""What the equations do, for docs/equations.md: schedules, and digits of the bundled model.

    python -m benchmarks.pictures_of_equations [--out docs/images]

Every row of digits but the noised ones is drawn from the same seed, so that a column differs by
what its row says alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from ddpm_fast import GaussianDiffusion, load, sample, sample_progressive
from ddpm_fast.atomic import atomic_write

from .pictures import FOLDER, Row, held_out, show
from .plots import STYLES

COLUMNS = 10
CLASSES = list(range(COLUMNS))
STEPS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every picture into a folder; 0 when they are written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures_of_equations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    for draw in (schedules, noised, denoised, eta, steps, guidance):
        figure = draw()
        with atomic_write(args.out / f"{draw.__name__}.png") as file:
            figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
        plt.close(figure)
    return 0


def schedules() -> Figure:
    """The signal that is left at each timestep, and its ratio to the noise."""
    make = GaussianDiffusion.from_schedule
    chosen = {
        "linear": (make("linear"), "-", STYLES["textbook"][1]),
        "scaled_linear": (make("scaled_linear"), "--", STYLES["lucidrains"][1]),
        "squaredcos_cap_v2": (make("squaredcos_cap_v2"), "-", STYLES["native"][1]),
        "sigmoid": (make("sigmoid"), "-.", STYLES["compiled"][1]),
        "linear, zero SNR": (
            make("linear", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            ":",
            STYLES["diffusers"][1],
        ),
    }
    figure, (signal, ratio) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for name, (diffusion, line, colour) in chosen.items():
        abar = diffusion.alphas_cumprod
        snr = abar / (1 - abar)
        style = {"linestyle": line, "color": colour, "linewidth": 2, "label": name}
        signal.plot(abar, **style)
        ratio.plot(torch.where(snr > 0, snr, torch.nan), **style)
    signal.set(title="alphas_cumprod", xlabel="t")
    ratio.set(
        title="signal to noise: abar / (1 - abar)", xlabel="t", yscale="log", ylim=(1e-6, 1e5)
    )
    for axes in (signal, ratio):
        axes.grid()
    figure.legend(*signal.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def noised() -> Figure:
    """A digit at ever later timesteps, with the same noise, under two schedules."""
    timesteps = [0, 50, 100, 200, 300, 400, 500, 600, 800, 999]
    rows = {}
    for name in ("linear", "squaredcos_cap_v2"):
        diffusion = GaussianDiffusion.from_schedule(name)
        digits = held_out(0).expand(len(timesteps), -1, -1, -1)
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        x_t, _ = diffusion.q_sample(digits, torch.tensor(timesteps), noise.expand_as(digits))
        rows[name] = list(x_t)
    return sheet(rows, [f"t = {t}" for t in timesteps])


def denoised() -> Figure:
    """One sample on its way through all steps of DDPM, and what the network takes it for."""
    timesteps = [999, 800, 600, 400, 300, 200, 150, 100, 50, 0]
    model, diffusion = load("digits")
    states, predictions = [], []
    options = {"diffusion": diffusion, "class_labels": 3, "seed": 0}
    for step, x_t, pred_xstart in sample_progressive(model, (1, 1, 8, 8), **options):
        if diffusion.num_timesteps - 1 - step in timesteps:
            states.append(x_t[0].clone())
            predictions.append(pred_xstart[0].clone())
    captions = [f"t = {t}" for t in timesteps]
    return sheet({"$x_{t-1}$": states, "$\\hat{x}_0$": predictions}, captions)


def eta() -> Figure:
    """DDIM, from no noise to as much as DDPM."""
    return digits_by("eta", (0.0, 0.25, 0.5, 0.75, 1.0), num_steps=STEPS)


def steps() -> Figure:
    """DDIM, from a few steps to many."""
    return digits_by("num_steps", (2, 5, 10, 20, 50, 200))


def guidance() -> Figure:
    """The same digits, ever more like what is typical of their class."""
    return digits_by("guidance_scale", (0.0, 1.0, 2.0, 4.0, 8.0), num_steps=STEPS)


def digits_by(option: str, values: Sequence[float], **options: float) -> Figure:
    """A row of all classes for each value of an option of DDIM."""
    model, diffusion = load("digits")
    shape = (COLUMNS, 1, 8, 8)
    fixed = {"diffusion": diffusion, "sampler": "ddim", "class_labels": CLASSES, "seed": 0}
    rows = {
        f"{option}\n= {value:g}": list(sample(model, shape, **fixed, **options, **{option: value}))
        for value in values
    }
    return sheet(rows, [f"{label}" for label in CLASSES])


def sheet(rows: Mapping[str, Row], captions: Sequence[str]) -> Figure:
    """Rows of pictures with their names to the left, and a caption above each column."""
    figure, grid = plt.subplots(len(rows), len(captions), figsize=(9.6, 0.25 + 0.85 * len(rows)))
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(caption, fontsize=9, fontweight="normal", loc="center")
    for row, (name, pictures) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axes, picture in zip(row, pictures, strict=True):
            show(axes, picture)
    return figure


if __name__ == "__main__":
    sys.exit(main())
