"""``ddpm-fast eval bpd | frechet | npz``."""

from __future__ import annotations

import argparse

from ..options import Command, add_commands
from . import bpd, frechet, npz

SUMMARY = (
    "measure a model or its samples: bits per dimension, Fréchet distance, files for FID tools"
)
EXAMPLES = f"""\
{bpd.EXAMPLES}
{frechet.EXAMPLES}
{npz.EXAMPLES}"""
MEASURES: dict[str, Command] = {"bpd": bpd, "frechet": frechet, "npz": npz}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: those of each measure."""
    add_commands(parser, MEASURES, "measure")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    args.measure.run(args)
