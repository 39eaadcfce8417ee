"""``ddpm-fast bench``."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from .. import bench
from ..atomic import atomic_write
from .options import add_device, check_file_writable, device_named, uses_native

SUMMARY = "measure the kernels beside eager PyTorch and the fallback, in a minute"
EXAMPLES = """\
  ddpm-fast bench
  ddpm-fast bench --device cuda --json bench.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_device(parser)
    parser.add_argument(
        "--json", metavar="FILE", help="write the measurements there too, in seconds and ratios"
    )


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if args.json is not None:
        check_file_writable(args.json, "--json")
    device = device_named(args.device)
    uses_native(device, "native")
    machine = bench.machine(device)
    progress = tqdm(bench.measure(device), disable=not sys.stderr.isatty(), leave=False)
    results = list(progress)
    print(f"ddpm_fast {machine['ddpm_fast']}, torch {machine['torch']}, on {machine['on']}")
    print("median time of a call, and of its ratio to the native one's in the same round\n")
    print(bench.table(results))
    if args.json is not None:
        rows = [result._asdict() for result in results]
        with atomic_write(args.json) as file:
            file.write(json.dumps({"machine": machine, "results": rows}, indent=2).encode())
