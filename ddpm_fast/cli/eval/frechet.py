"""``ddpm-fast eval frechet``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import operator
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...data import Dataset
from ...frechet import Extractor, FeatureStatistics, features_of, frechet_distance, pixels
from ...memory import is_out_of_memory, out_of_memory_as
from ..options import add_batch, add_device, device_named
from .pictures import DIGITS, HELP, METAVAR, add_size, batch_of, batches_of, opened

SUMMARY = "the Fréchet distance between two sets of pictures, on features that you name"
EXAMPLES = """\
  ddpm-fast eval frechet samples.npz digits
  ddpm-fast eval frechet samples/ cats/ --image-size 64 --features my_features:network"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measure."""
    parser.add_argument("samples", metavar="SAMPLES", help=f"{METAVAR}: {HELP}")
    parser.add_argument("reference", metavar="REFERENCE", help="the same")
    parser.add_argument(
        "--features",
        default="pixels",
        metavar="NAME",
        help="pixels, or package.module:callable, which is imported, also from here, and called "
        "with pictures [N, C, H, W] in [-1, 1] for features [N, D] (default: %(default)s)",
    )
    add_size(parser)
    add_batch(parser, "pictures at a time")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    device = device_named(args.device)
    extractor = extractor_named(args.features)
    if isinstance(extractor, nn.Module):
        with out_of_memory_as(f"--features {args.features}: {device} has too little memory for it"):
            extractor = extractor.to(device)
    size, channels = _size(args)
    sets = [opened(data, size, channels) for data in (args.samples, args.reference)]
    for data, found in zip((args.samples, args.reference), sets, strict=True):
        if len(found) < 2:
            raise ValueError(f"{data}: the distance needs two pictures or more; got {len(found)}")
    of_samples, of_reference = (_features(args, extractor, data, device) for data in sets)
    first = next(of_samples)
    dimensions = first.shape[1]
    try:
        samples, reference = FeatureStatistics(dimensions), FeatureStatistics(dimensions)
    except ValueError as error:
        raise ValueError(f"{error} (--image-size, --features)") from None
    _warn_of_few_pictures(dimensions, *map(len, sets))
    for features in itertools.chain([first], of_samples):
        samples.update(features)
    for features in of_reference:
        reference.update(features)
    print(f"{args.samples}: {samples.count} pictures")
    print(f"{args.reference}: {reference.count} pictures")
    print(
        f"Fréchet distance on {args.features}, {dimensions} features: "
        f"{frechet_distance(samples, reference):.4f}"
    )


def extractor_named(name: str) -> Extractor:
    """``pixels``, or what ``package.module:callable`` names, imported from where Python looks.

    Raises:
        ValueError: it is neither, or cannot be imported, or not be called.
    """
    if name == "pixels":
        return pixels
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--features {name} is neither pixels nor package.module:callable")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look here of itself
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:
        raise ValueError(
            f"--features {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"--features {name} cannot be called: it is a {type(found).__name__}")
    extractor: Extractor = found
    return extractor


def _size(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Of the pictures of both sets: the digits' own where one is of them."""
    is_digits = any(data in DIGITS for data in (args.samples, args.reference))
    size, channels = (8, 1) if is_digits else (None, None)
    return args.image_size or size, args.channels or channels


def _features(
    args: argparse.Namespace, extractor: Extractor, dataset: Dataset, device: torch.device
) -> Iterator[Tensor]:
    """Those of all pictures, batch by batch; what an extractor raises is one sentence."""
    sentence = (
        f"--batch {args.batch}: {device} has too little memory for so many pictures at a time"
    )
    for indices in batches_of(dataset, args.batch):
        with out_of_memory_as(sentence):
            images = batch_of(dataset, indices)[0].to(device)
            try:
                yield from features_of(extractor, images, batch_size=args.batch)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                line = str(error).partition("\n")[0]
                raise ValueError(
                    f"--features {args.features} failed: {type(error).__name__}: {line}"
                ) from error


def _warn_of_few_pictures(dimensions: int, samples: int, reference: int) -> None:
    if min(samples, reference) <= dimensions:
        warnings.warn(
            f"{dimensions} features want more than {dimensions} pictures in each set, "
            f"for which there are {samples} and {reference}",
            stacklevel=3,
        )
