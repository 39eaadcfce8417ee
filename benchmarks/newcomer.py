"""A newcomer's path: from a folder of pictures to samples of that kind, in two commands.

    python -m benchmarks.newcomer

Makes the folder, runs the two commands of docs/your-own-images.md and times them; writes the times
to benchmarks/results/newcomer.json, and the page's pictures and figures. The pictures are
scikit-learn's handwritten digits, twice as large, in ink of some colour on paper of some other.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_fast.atomic import atomic_write
from ddpm_fast.data import ImageFolder
from ddpm_fast.image_io import save_grid

from .origin import machine_info
from .report import NEWCOMER, ROOT, replace_between_markers

IMAGE_SIZE = 16
CLASSES = 10
ROWS = 10
TRAIN = (
    f"ddpm-fast train pictures --image-size {IMAGE_SIZE} --classes-from-folders --no-flip"
    " --model-channels 32 --batch-size 32 --lr 1e-3 --warmup-steps 100 --steps 1000"
    " --checkpoint-every 250 --out pictures.safetensors"
)
SAMPLE = (
    f"ddpm-fast sample --checkpoint pictures.safetensors --num {CLASSES * ROWS}"
    " --batch 100 --steps 100 --out samples.png"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the path and write what came of it; 0 when that is done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.newcomer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to")
    parser.add_argument("--train", default=TRAIN, metavar="COMMAND", help="default: the page's")
    args = parser.parse_args(argv)
    images = args.root / "docs" / "images"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        number = write_pictures(work / "pictures")
        seconds = {command: timed(command, work) for command in (args.train, SAMPLE)}
        show_pictures(work / "pictures", images / "your-own-pictures.png")
        with atomic_write(images / "your-own-samples.png") as file:
            file.write((work / "samples.png").read_bytes())
    facts = {"machine_info": machine_info(), "pictures": number, "seconds": seconds}
    with atomic_write(args.root / "benchmarks" / "results" / NEWCOMER) as file:
        file.write((json.dumps(facts, indent=2) + "\n").encode())
    page = args.root / "docs" / "your-own-images.md"
    replace_between_markers(page, "commands", commands_of(seconds))
    replace_between_markers(page, "times", times_of(facts))
    return 0


def write_pictures(folder: Path, seed: int = 0) -> int:
    """Coloured digits as PNG files, a subfolder for each class; tells how many there are."""
    source, rng = load_digits(), np.random.default_rng(seed)
    for index, (digit, label) in enumerate(zip(source.images, source.target, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coloured(digit, *rng.random(2)).save(path)
    return len(source.images)


def coloured(digit: npt.NDArray[Any], ink_hue: float, paper_hue: float) -> Image.Image:
    """A digit [8, 8] of 0 ... 16 in dark ink on light paper."""
    grey = Image.fromarray((digit * 255 / 16).astype(np.uint8))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    cover = np.asarray(grey.resize(size, Image.Resampling.BICUBIC))[:, :, None] / 255
    ink = np.array(colorsys.hsv_to_rgb(ink_hue, 0.9, 0.75))
    paper = np.array(colorsys.hsv_to_rgb(paper_hue, 0.12, 1.0))
    pixels = paper + cover * (ink - paper)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def timed(command: str, folder: Path) -> float:
    """Seconds that a command takes in a folder, the start of the process included."""
    program, *arguments = shlex.split(command)
    assert program == "ddpm-fast"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ddpm_fast", *arguments], cwd=folder, check=True)
    return time.perf_counter() - started


def show_pictures(folder: Path, path: Path) -> None:
    """Some of the training pictures, in the order of the samples: each class a column."""
    dataset = ImageFolder(folder, IMAGE_SIZE, flip=False, class_labels=True)
    assert dataset.labels is not None
    columns = [(dataset.labels == label).nonzero()[:ROWS, 0] for label in range(CLASSES)]
    indices = torch.stack(columns, dim=1).flatten()
    images, labels = dataset.batch(indices, torch.Generator())
    save_grid(images, path, labels=labels, columns=CLASSES)


def commands_of(seconds: dict[str, float]) -> str:
    """The commands, each an argument to a line where they are long."""
    lines = [command.replace(" --", " \\\n    --") for command in seconds]
    return "\n".join(["```sh", *lines, "```"])


def times_of(facts: dict[str, Any]) -> str:
    """How long they took, and where."""
    machine = facts["machine_info"]
    train, sample = facts["seconds"].values()
    return (
        f"Of {facts['pictures']:,} pictures, on {machine['cpu']}, {machine['threads']} threads,"
        f" torch {machine['versions']['torch']}: training took {train:.0f} s and sampling"
        f" {sample:.0f} s, each with the start of its process."
    )


if __name__ == "__main__":
    sys.exit(main())
