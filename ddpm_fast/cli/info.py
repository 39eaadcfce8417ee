"""``ddpm-fast info``."""

from __future__ import annotations

import argparse
import json

from .. import info
from ..checkpoint import BUNDLED

SUMMARY = "tell versions, the backend of each device, bundled models"
EXAMPLES = """\
  ddpm-fast info
  ddpm-fast info --json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    facts = info() | {"models": list(BUNDLED)}
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    why = facts["reason"] or "this torch is built without CUDA"
    build = [f"{name} {value}" for name, value in facts["build"].items() if value]
    rows = {
        "ddpm_fast": facts["version"],
        "torch": facts["torch"],
        **{
            f"on {device}": backend if backend == "native" else f"{backend}: {why}"
            for device, backend in facts["backends"].items()
        },
        "extension": ", ".join(build) or "none",
        "models": ", ".join(facts["models"]),
    }
    for name, value in rows.items():
        print(f"{name:<10} {value}")
