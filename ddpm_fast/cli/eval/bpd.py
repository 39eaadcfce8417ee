"""``ddpm-fast eval bpd``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...atomic import atomic_write
from ...checkpoint import Loaded
from ...likelihood import BitsPerDim, bits_per_dim
from ...memory import out_of_memory_as
from ..options import (
    add_batch,
    add_checkpoint,
    add_device,
    add_image_size,
    add_precision,
    add_seed,
    add_spacing,
    check_file_writable,
    count,
    device_named,
    loaded,
)
from . import pictures

SUMMARY = "bits per dimension of pictures under a model, by the variational bound"
EXAMPLES = """\
  ddpm-fast eval bpd --num 20 --steps 20
  ddpm-fast eval bpd --checkpoint cats.safetensors --data cats/ --json bpd.json"""
DIGIT_LEVELS = 17


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measure."""
    add_checkpoint(parser)
    parser.add_argument(
        "--data",
        default="digits",
        metavar=pictures.METAVAR,
        help=f"{pictures.HELP} (default: %(default)s)",
    )
    parser.add_argument(
        "--num", type=count, metavar="N", help="so many of them, taken evenly (default: all)"
    )
    parser.add_argument(
        "--levels",
        type=count,
        metavar="N",
        help=f"values that a pixel can have (default: {DIGIT_LEVELS} for the digits, else 256)",
    )
    add_image_size(parser)
    parser.add_argument(
        "--classes-from-folders", action="store_true", help="the subfolders are the classes"
    )
    parser.add_argument(
        "--label-column", metavar="NAME", help="the classes of an .npz or of datasets, e.g. arr_1"
    )
    parser.add_argument(
        "--steps", type=count, metavar="N", help="of a shorter chain (default: all the model's)"
    )
    add_spacing(parser)
    add_seed(parser, "bound")
    add_batch(parser, "pictures at a time; changes no bound")
    add_device(parser)
    add_precision(parser)
    parser.add_argument("--json", metavar="FILE", help="write every term there too")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if args.json is not None:
        check_file_writable(args.json, "--json")
    device = device_named(args.device)
    model, diffusion = loaded(args.checkpoint, device)
    images, labels = _chosen(args, model)
    levels = args.levels or (DIGIT_LEVELS if args.data in pictures.DIGITS else 256)
    with out_of_memory_as(
        f"--batch {args.batch}: {device} has too little memory for so many pictures at a time"
    ):
        found = bits_per_dim(
            model,
            diffusion,
            images,
            levels=levels,
            class_labels=labels,
            num_steps=args.steps,
            timestep_spacing=args.spacing,
            seed=args.seed,
            batch_size=args.batch,
            device=device,
            precision=args.precision,
            progress=sys.stderr.isatty(),
        )
    print(
        f"{args.checkpoint}: {len(images)} pictures of {args.data}, "
        f"{'no labels' if labels is None else 'with labels'}, {levels} levels, seed {args.seed}\n"
    )
    print(table(found))
    if args.json is not None:
        facts = {"options": _options(args), "levels": levels, "labels": labels is not None}
        with atomic_write(args.json) as file:
            file.write(json.dumps(facts | summary(found), indent=2).encode())


def _chosen(args: argparse.Namespace, model: Loaded) -> tuple[Tensor, Tensor | None]:
    """The pictures to measure, and their labels where the model wants and the data have them."""
    size = args.image_size or getattr(model, "image_size", None)
    columns = {"class_labels": args.classes_from_folders, "label_column": args.label_column}
    dataset = pictures.opened(args.data, size, model.in_channels, **columns)
    known = getattr(model, "num_classes", None)
    # The class behind the model's own would pass: it is the null label.
    if known is not None and (dataset.num_classes or 0) > known:
        raise ValueError(
            f"{args.data}: has {dataset.num_classes} classes, of which the model knows {known}"
        )
    number = min(args.num or len(dataset), len(dataset))
    images, labels = pictures.batch_of(dataset, evenly(len(dataset), number))
    return images, None if known is None else labels


def evenly(length: int, count: int) -> Tensor:
    """int64 ``[count]``: so many of the indices below ``length``, from the first to the last."""
    return torch.linspace(0, length - 1, count, dtype=torch.float64).round().long()


def table(found: BitsPerDim) -> str:
    """The terms, put together by the powers of two that their timesteps lie between."""
    *steps, last = found.timesteps
    terms = found.terms.mean(dim=0).tolist()
    bands: dict[int, list[int]] = {}
    for k, t in enumerate(steps):
        bands.setdefault(t.bit_length(), []).append(k)
    rows = {"the prior": float(found.prior.mean())}
    for chosen in bands.values():
        first, end = steps[chosen[0]], steps[chosen[-1]]
        name = f"t = {first}" if first == end else f"t = {first} ... {end}"
        rows[name] = sum(terms[k] for k in chosen)
    rows[f"t = {last}, the decoder"] = terms[-1]
    rows["total"] = float(found.total.mean())
    lines = [f"{name:24}{bits:8.4f}" for name, bits in rows.items()]
    if len(found.total) > 1:
        lines[-1] += f" ± {_standard_error(found):.4f} (standard error)"
    return "\n".join([f"{'':24}bits per dimension", *lines])


def summary(found: BitsPerDim) -> dict[str, Any]:
    """JSON-able: means over the pictures, and the bound of each."""
    return {
        "total": float(found.total.mean()),
        "standard_error": _standard_error(found) if len(found.total) > 1 else None,
        "prior": float(found.prior.mean()),
        "timesteps": list(found.timesteps),
        "terms": found.terms.mean(dim=0).tolist(),
        "totals": found.total.tolist(),
    }


def _standard_error(found: BitsPerDim) -> float:
    return float(found.total.std()) / math.sqrt(len(found.total))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that can stand in JSON: not the modules that are the command."""
    return {k: value for k, value in vars(args).items() if not isinstance(value, ModuleType)}
