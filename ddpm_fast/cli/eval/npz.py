"""``ddpm-fast eval npz``."""

from __future__ import annotations

import argparse

from ...atomic import atomic_write
from ...image_io import to_uint8
from ...image_io.npz import write_npz
from ..options import check_file_writable
from .pictures import HELP, METAVAR, add_size, batch_of, batches_of, opened

SUMMARY = "pictures as an npz that FID tools take: arr_0, uint8 [N, H, W, C]"
EXAMPLES = "  ddpm-fast eval npz photos/ --image-size 64 --out reference.npz"

_BATCH = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measure."""
    parser.add_argument("data", metavar=METAVAR, help=HELP)
    parser.add_argument("--out", required=True, metavar="FILE", help="the npz to write")
    add_size(parser)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if not args.out.endswith(".npz"):
        raise ValueError(f"--out {args.out} must end in .npz")
    check_file_writable(args.out, "--out")
    dataset = opened(args.data, args.image_size, args.channels)
    # One at a time: reference sets are large.
    parts = (to_uint8(batch_of(dataset, few)[0]) for few in batches_of(dataset, _BATCH))
    with atomic_write(args.out) as file:
        shape = write_npz(file, parts, len(dataset))
    print(f"{args.out}: {len(dataset)} pictures of {args.data}, uint8 {list(shape)}")
