"""``ddpm-fast eval bpd | frechet | npz``."""

from __future__ import annotations

import argparse

from . import bpd, frechet, npz

SUMMARY = (
    "measure a model or its samples: bits per dimension, Fréchet distance, files for FID tools"
)
EXAMPLES = f"""\
examples:
{bpd.EXAMPLES}
{frechet.EXAMPLES}
{npz.EXAMPLES}"""
MEASURES = {"bpd": bpd, "frechet": frechet, "npz": npz}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: those of each measure."""
    measures = parser.add_subparsers(metavar="MEASURE", required=True)
    for name, measure in MEASURES.items():
        added = measures.add_parser(
            name,
            help=measure.SUMMARY,
            description=measure.SUMMARY,
            epilog=f"examples:\n{measure.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        measure.add_options(added)
        added.set_defaults(measure=measure.run)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    args.measure(args)
