"""How good are the samples of a model of the digits? Three figures, each against real digits.

    python -m benchmarks.quality [--checkpoint digits] [--sampler ddpm] [--steps N] [--num 1000]
    python -m benchmarks.quality --memoriser order|random

The model has seen the half "train" of scikit-learn's digits and never the half "held_out", which
looks as if by other writers.

- *Labelled as asked*: the share of class-conditional samples that a classifier (support vectors,
  RBF kernel) takes for the class asked for. It is trained on "train", so that it knows the hands
  that the samples imitate; the column "real" is its accuracy on "held_out". Copies of training
  pictures would pass here, and fail the third figure. The second line is the same with a classifier
  trained on "held_out", which has seen no picture that the model has; the real digits of "train"
  are strange to it, so it has no bound, and is to be read against its column "real".
- *Fréchet distance* between the Gaussians fitted to the 64 pixels (Heusel et al. 2017, arXiv
  1706.08500, with pixels as features): samples to "held_out" over "train" to "held_out", sets of
  equal size, since the distance shrinks as sets grow. At 1 the samples are as near to the digits
  held out as real digits are. The halves differ so much that this forgives a poor fit to
  "train"; so the line below it, without a bound, is samples to "train" over one random half of
  "train" to the other, where 1 is a perfect fit. All are means over 20 random draws.
- *Nearest neighbour*: the median distance from samples to their nearest neighbours in "train" over
  that from "held_out" digits. Copies of training pictures would give 0.

`--memoriser` measures, instead of a model, one that would know "train" by heart: pictures of
"train", drawn with replacement. With "random" the halves are stratified random ones (seed 0), which
the checkpoint has not been trained on.

Exits with 1 if a figure misses its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_fast import load, sample
from ddpm_fast.data import TensorDataset, digits
from ddpm_fast.frechet import frechet_distance

Array = NDArray[np.float64]

MIN_LABELLED = 0.97
MAX_FRECHET_RATIO = 1.25
MIN_NEIGHBOUR_RATIO = 0.8

_DRAWS = 20


class Figure(NamedTuple):
    """A measure of the samples, the same of real digits, and the value that the bound is for."""

    name: str
    samples: float
    real: float
    value: float
    bound: str = ""
    met: bool = True


class Halves(NamedTuple):
    """Real digits: those that the samples imitate, and others."""

    train: TensorDataset
    held_out: TensorDataset


def halves(split: str = "order") -> Halves:
    """Of the digits, as they lie, or stratified random ones."""
    if split == "order":
        return Halves(digits("train"), digits("held_out"))
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    both = digits("all")
    parts = train_test_split(range(len(both)), test_size=0.5, stratify=both.labels, random_state=0)
    return Halves(
        *(
            TensorDataset(*both.batch(torch.tensor(part), torch.Generator()), both.num_classes)
            for part in parts
        )
    )


def measure(
    samples: Array, labels: Array, seed: int = 0, real: Halves | None = None
) -> list[Figure]:
    """The figures of ``samples`` [N, 64] in [-1, 1], drawn for the classes ``labels`` [N].

    ``seed`` is of the random subsets that are compared, ``real`` what the samples are held
    against, by default the halves by order.
    """
    train, held_out = real or halves()
    rng = np.random.default_rng(seed)

    right, accuracy = _labelled(samples, labels, train, held_out)
    other_right, other_accuracy = _labelled(samples, labels, held_out, train)
    far, far_real, near, near_real = _frechet(samples, _pixels(train), _pixels(held_out), rng)
    apart = float(np.median(nearest_distances(samples, _pixels(train))))
    apart_real = float(np.median(nearest_distances(_pixels(held_out), _pixels(train))))
    return [
        _at_least(MIN_LABELLED, "labelled as asked", right, accuracy, right),
        Figure("  by another classifier", other_right, other_accuracy, other_right),
        _at_most(MAX_FRECHET_RATIO, "Fréchet distance", far, far_real, far / far_real),
        Figure("  to the training half", near, near_real, near / near_real),
        _at_least(MIN_NEIGHBOUR_RATIO, "nearest neighbour", apart, apart_real, apart / apart_real),
    ]


def _at_least(bound: float, name: str, samples: float, real: float, value: float) -> Figure:
    return Figure(name, samples, real, value, f">= {bound}", value >= bound)


def _at_most(bound: float, name: str, samples: float, real: float, value: float) -> Figure:
    return Figure(name, samples, real, value, f"<= {bound}", value <= bound)


def _labelled(
    samples: Array, labels: Array, known: TensorDataset, unknown: TensorDataset
) -> tuple[float, float]:
    """Accuracy on the samples and on the digits ``unknown`` of a classifier of ``known``."""
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    classifier = SVC(C=10, gamma="scale").fit(_pixels(known), known.labels)
    right, accuracy = (
        classifier.score(pictures, classes)
        for pictures, classes in ((samples, labels), (_pixels(unknown), unknown.labels))
    )
    return float(right), float(accuracy)


def _frechet(
    samples: Array, train: Array, held_out: Array, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Of samples and of "train" to "held_out"; of samples to "train" and of its halves."""

    def draw(pictures: Array, size: int) -> Array:
        return pictures[rng.permutation(len(pictures))[:size]]

    def mean(distance: Callable[[], float]) -> float:
        return float(np.mean([distance() for _ in range(_DRAWS)]))

    size = min(len(samples), len(train))
    small = min(len(samples), len(train) // 2)

    def between_halves() -> float:
        both = draw(train, 2 * small)
        return frechet_distance(both[:small], both[small:])

    return (
        mean(lambda: frechet_distance(draw(samples, size), draw(held_out, size))),
        mean(lambda: frechet_distance(draw(train, size), draw(held_out, size))),
        mean(lambda: frechet_distance(draw(samples, small), draw(train, small))),
        mean(between_halves),
    )


def nearest_distances(queries: Array, references: Array) -> Array:
    """The Euclidean distance of each query [N, D] to the nearest of the references [M, D], [N]."""
    distances = torch.cdist(torch.from_numpy(queries), torch.from_numpy(references))
    nearest: Array = distances.min(dim=1).values.numpy()
    return nearest


def _pixels(dataset: TensorDataset) -> Array:
    pixels: Array = dataset.images.flatten(1).double().numpy()
    return pixels


def draw_samples(args: argparse.Namespace) -> tuple[Array, Array]:
    """Samples [num, 64] of the checkpoint, and the classes they were drawn for, in turn."""
    model, diffusion = load(args.checkpoint, device=args.device)
    labels = torch.arange(args.num) % 10
    batches = []
    for start in range(0, args.num, args.batch):
        chosen = labels[start : start + args.batch]
        images = sample(
            model,
            (len(chosen), 1, 8, 8),
            diffusion=diffusion,
            sampler=args.sampler,
            num_steps=args.steps,
            guidance_scale=args.guidance,
            seed=args.seed,
            first_index=start,
            class_labels=chosen.to(args.device),
            progress=sys.stderr.isatty(),
        )
        batches.append(images.flatten(1).double().cpu())
    return torch.cat(batches).numpy(), labels.numpy()


def memorised(real: Halves, num: int, seed: int) -> tuple[Array, Array]:
    """``num`` of the training digits, drawn with replacement, [num, 64], and their classes."""
    chosen = np.random.default_rng(seed).integers(len(real.train), size=num)
    assert real.train.labels is not None
    return _pixels(real.train)[chosen], real.train.labels.numpy()[chosen]


def table(figures: Sequence[Figure]) -> str:
    """The figures in columns."""
    lines = [f"{'':24}{'samples':>10}{'real':>10}{'measured':>10}  bound"]
    for name, samples, real, value, bound, met in figures:
        verdict = f"{bound} {'met' if met else 'MISSED'}" if bound else "none"
        lines.append(f"{name:24}{samples:10.4f}{real:10.4f}{value:10.4f}  {verdict}")
    return "\n".join(lines)


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What to draw and measure, as the command line says it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", default="digits", help="name or path (default: digits)")
    parser.add_argument("--memoriser", choices=("order", "random"), help="of halves split so")
    parser.add_argument("--sampler", default="ddpm", help="default: ddpm")
    parser.add_argument("--steps", type=int, help="default: all of the diffusion's")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: none)")
    parser.add_argument("--num", type=int, default=1000, help="samples (default: 1000)")
    parser.add_argument("--batch", type=int, default=250, help="samples at a time (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, measure and print; 0 if all bounds are met, else 1."""
    args = options(argv)
    real = halves(args.memoriser or "order")
    drawn = memorised(real, args.num, args.seed) if args.memoriser else draw_samples(args)
    figures = measure(*drawn, seed=args.seed, real=real)
    if args.json:
        print(json.dumps({"options": vars(args), "figures": [f._asdict() for f in figures]}))
    else:
        print(table(figures))
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
