"""What ``ddpm-fast sample`` shows of the way to the samples: an animation, a film strip."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from .. import image_io
from ..image_io.animation import ANIMATIONS
from ..intermediates import Intermediates, checked_moments
from .options import check_file_writable, count

FRAMES, COLUMNS = 50, 10


def add_film(parser: argparse._ActionsContainer) -> None:
    """Add what the film is asked for with."""
    parser.add_argument(
        "--strip",
        metavar="FILE.png",
        help="also write a film strip of the denoising: a row per sample, a column per moment",
    )
    parser.add_argument(
        "--frames",
        type=count,
        metavar="N",
        help="moments shown, noise and samples included "
        f"(default: {FRAMES} in an animation, {COLUMNS} in a strip)",
    )


def check_film(args: argparse.Namespace, kind: str) -> None:
    """Refuse what makes no sense, before any work; ``kind`` is that of ``--out``.

    Raises:
        ValueError: another strip than a .png that can be written, or one that is the output too;
            frames of nothing, or too few.
    """
    if args.strip is not None:
        if Path(args.strip).suffix.lower() != ".png":
            raise ValueError(f"--strip {args.strip} must end in .png")
        check_file_writable(args.strip, "--strip")
        if Path(args.strip).resolve() == Path(args.out).resolve():
            raise ValueError(f"--strip and --out are one file, {args.strip}")
    if args.frames is None:
        return
    if args.strip is None and kind not in ANIMATIONS:
        raise ValueError(
            f"--frames {args.frames} is for an animation, --out FILE.gif or .webp, and for --strip"
        )
    if args.frames < 2:
        raise ValueError("--frames must be at least 2, the noise and the samples; got 1")


class Film:
    """The moments of all batches, on the CPU.

    Args:
        args: of the command line, checked.
        kind: that of ``--out``.
        num_steps: of the run.

    Raises:
        ValueError: more frames than such a run has moments.
    """

    def __init__(self, args: argparse.Namespace, kind: str, num_steps: int) -> None:
        most = num_steps + 1
        if args.frames is not None and args.frames > most:
            raise ValueError(
                f"--frames {args.frames}: a run of {num_steps} steps has {most} moments to show"
            )
        self.frames = min(args.frames or FRAMES, most)
        self.columns = min(args.frames or COLUMNS, most)
        # How many moments of each batch are to be kept.
        self.moments = self.frames if kind in ANIMATIONS else self.columns if args.strip else None
        self._captions: list[str] = []
        self._batches: list[Tensor] = []

    def take(self, drawn: Tensor | tuple[Tensor, Intermediates]) -> Tensor:
        """The images of a batch drawn with ``return_intermediates=self.moments``."""
        if isinstance(drawn, Tensor):
            return drawn
        images, intermediates = drawn
        self._captions = intermediates.captions()
        self._batches.append(intermediates.x_t.cpu())
        return images

    def save_animation(self, path: str, labels: list[int] | None) -> None:
        """All moments, each a grid of all samples."""
        frames = torch.cat(self._batches, dim=1)
        image_io.save_animation(frames, path, captions=self._captions, labels=labels)

    def save_strip(self, path: str, labels: list[int] | None) -> None:
        """As many moments as a strip shows; of those of an animation, as evenly as can be."""
        shown = list(checked_moments(self.columns, len(self._captions) - 1))
        frames = torch.cat([batch[shown] for batch in self._batches], dim=1)
        captions = [self._captions[place] for place in shown]
        image_io.save_strip(frames, path, captions=captions, labels=labels)
