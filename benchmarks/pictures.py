"""What the bundled model of digits makes of real ones and of noise, for docs/.

    python -m benchmarks.pictures [--out docs/images]

For docs/editing.md: inpainting, image to image and interpolation of digits that the model has not
seen. Only image to image is given a class, another than the digit's own; else what is drawn
follows from the pixels. For docs/output.md: the denoising, as a film strip and animated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_fast import load, sample
from ddpm_fast.atomic import atomic_write
from ddpm_fast.data import digits
from ddpm_fast.editing import image_to_image, inpaint, interpolate, invert
from ddpm_fast.image_io import save_animation, save_strip

FOLDER = Path(__file__).parent.parent / "docs" / "images"
UNKNOWN = "#56B4E9"
COLUMNS = 8
STEPS = 50
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
FRAMES = 51  # every 20th of 1000 steps; and of these, closer where it shows,
COLUMNS_OF_STRIP = [0, 15, 25, 30, 35, 40, 43, 45, 48, 50]

Row = list[Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures; 0 when they are written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args(argv)
    figure = draw()
    with atomic_write(args.out / "editing-digits.png") as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)
    denoising(args.out)
    return 0


def denoising(folder: Path) -> None:
    """States above, and below them the digits that the network takes them for."""
    model, diffusion = load("digits")
    options = {"diffusion": diffusion, "class_labels": range(10), "seed": 0}
    _, kept = sample(model, (10, 1, 8, 8), return_intermediates=FRAMES, **options)
    captions = kept.captions()
    frames = torch.cat([kept.x_t, kept.pred_xstart], dim=1)
    save_animation(frames, folder / "denoising.webp", captions=captions, columns=10)

    pairs = torch.stack([kept.x_t, kept.pred_xstart], dim=2)[:, [3, 8, 4]].flatten(1, 2)
    save_strip(
        pairs[COLUMNS_OF_STRIP],
        folder / "denoising.png",
        captions=[captions[column] for column in COLUMNS_OF_STRIP],
        labels=["x_t", "pred_xstart"] * 3,
    )


def draw() -> Figure:
    """The figure: a band of rows for each way of editing."""
    zero, three, five, nine = (held_out(label) for label in (0, 3, 5, 9))
    bands = {
        "Inpainting": (
            ["digit", "known", *(f"sample {index}" for index in range(COLUMNS - 2))],
            [inpainted(digit) for digit in (zero, three, nine)],
        ),
        "Image to image: a 3 to an 8, a 5 to a 6, a 9 to a 4": (
            ["digit", *(f"strength {strength}" for strength in STRENGTHS)],
            [turned(three, 8), turned(five, 6), turned(nine, 4)],
        ),
        "Interpolation": (
            ["a digit", *[""] * (COLUMNS - 2), "another"],
            [between(zero, five), between(three, nine)],
        ),
    }
    heights = [0.5 + len(rows) for _, rows in bands.values()]
    figure = plt.figure(figsize=(COLUMNS, sum(heights) + 0.5), layout="constrained")
    parts = figure.subfigures(len(bands), height_ratios=heights)
    for part, (title, (captions, rows)) in zip(parts, bands.items(), strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(len(rows), COLUMNS)
        for ax, caption in zip(axes[0], captions, strict=True):
            ax.set_title(caption, fontsize=9)
        for row_of_axes, pictures in zip(axes, rows, strict=True):
            for ax, picture in zip(row_of_axes, pictures, strict=True):
                show(ax, picture)
    return figure


def show(ax: Axes, picture: Tensor) -> None:
    """One picture [1, H, W]; NaN is what is not known."""
    ax.set_facecolor(UNKNOWN)
    ax.imshow(picture[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def held_out(label: int) -> Tensor:
    """The first digit of a class among those that the model has not seen, [1, 1, 8, 8]."""
    data = digits("held_out")
    assert data.labels is not None
    return data.images[data.labels == label][:1]


def inpainted(digit: Tensor) -> Row:
    """The digit, its right half, and completions of it."""
    model, diffusion = load("digits")
    right = (torch.arange(8) >= 4).float()
    drawn = inpaint(
        model,
        digit.expand(COLUMNS - 2, -1, -1, -1),
        right,
        diffusion=diffusion,
        num_steps=STEPS,
        jump_n_sample=3,
        seed=0,
    )
    return [digit[0], torch.where(right == 1, digit[0], torch.nan), *drawn]


def turned(digit: Tensor, label: int) -> Row:
    """The digit, and what ever more noise lets the model make of it, told that it is another."""
    model, diffusion = load("digits")
    options = {"diffusion": diffusion, "num_steps": STEPS, "seed": 0, "class_labels": label}
    drawn = [
        image_to_image(model, digit, strength=strength, **options)[0] for strength in STRENGTHS
    ]
    return [digit[0], *drawn]


def between(first: Tensor, second: Tensor) -> Row:
    """From one digit to another, by way of the noise that either comes from."""
    model, diffusion = load("digits")
    options = {"diffusion": diffusion, "num_steps": STEPS}
    start, end = invert(model, torch.cat([first, second]), **options)
    return list(interpolate(model, start, end, COLUMNS, **options))


if __name__ == "__main__":
    sys.exit(main())
