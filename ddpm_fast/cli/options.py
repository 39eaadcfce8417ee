"""What the commands share: how they are added, options, and checks before any work is done."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint import Loaded, load
from ..diffusion import GaussianDiffusion
from ..image_io.animation import ANIMATIONS
from ..memory import out_of_memory_as
from ..network import PRECISIONS
from ..ops import serves_natively
from ..processes import local_device
from ..schedules import TIMESTEP_SPACINGS

PROG = "ddpm-fast"


class Command(Protocol):
    """A module that is a command: what it is for, how it is called, and what it does."""

    SUMMARY: str
    EXAMPLES: str

    def add_options(self, parser: argparse.ArgumentParser, /) -> None:
        """Add its options."""

    def run(self, args: argparse.Namespace, /) -> None:
        """Do what the command line asks for."""


def add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, Command], name: str
) -> None:
    """Add commands, of which one must be given; ``args.<name>`` is its module."""
    added = parser.add_subparsers(metavar=name.upper(), required=True)
    for word, command in commands.items():
        inner = added.add_parser(
            word,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(inner)
        inner.set_defaults(**{name: command})


def output_kind(out: str) -> str:
    """What ``--out`` asks for: ".png" a grid, ".gif" or ".webp" an animation, ".npz" an archive.

    Or "folder", a PNG per image.

    A folder is a path that ends in a slash, or one that exists as a folder.

    Raises:
        ValueError: any other path.
    """
    if is_folder(out):
        return "folder"
    extension = Path(out).suffix
    if extension.lower() in (".png", ".npz", *ANIMATIONS):
        return extension.lower()
    found = f"the extension {extension}" if extension else "no extension"
    raise ValueError(
        f"--out {out} has {found}; known are .png (a grid), .gif and .webp (an animation), "
        f".npz (arrays), and a folder, written with a slash: {out}/"
    )


def is_folder(out: str) -> bool:
    """Whether a path that is written to means a folder, which may not be there yet."""
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def check_file_writable(out: str, option: str) -> None:
    """Find out before the work is done whether the file that ``option`` asks for can be written.

    Raises:
        ValueError: its folder is missing, nothing can be written there, or it is a folder or
            another thing that is no file.
    """
    path = Path(out)
    if is_folder(out):
        raise ValueError(f"{option} {out} is a folder; name the file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} {out} exists and is not a regular file")
    _check_writable(path.parent, out, option)


def check_folder_writable(out: str, option: str) -> None:
    """Find out before the work is done whether files can be written into a folder.

    Raises:
        ValueError: nothing can be written there, or where it is to be made.
    """
    path = Path(out)
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    _check_writable(folder, out, option)


def _check_writable(folder: Path, out: str, option: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {out}: cannot write in {folder}: {error.strerror}") from None


def uses_native(device: torch.device, backend: str) -> bool:
    """Whether the kernels will serve; ValueError where ``backend`` asks for what is not there."""
    try:
        return serves_natively(device, backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def device_named(name: str | None) -> torch.device:
    """This process's device of that name, found to work; without one a GPU if there is one.

    Raises:
        ValueError: there is no such device, or it is another process's.
    """
    if name is None:
        return local_device()
    try:
        device = local_device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def loaded(checkpoint: str, device: torch.device) -> tuple[Loaded, GaussianDiffusion]:
    """What ``--checkpoint`` names, on a device.

    Raises:
        ValueError: too little memory; and see :func:`ddpm_fast.load`.
    """
    with out_of_memory_as(f"{checkpoint}: {device} has too little memory for it"):
        return load(checkpoint, device=device)


def add_device(parser: argparse._ActionsContainer) -> None:
    """``--device``, for :func:`device_named`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    """``--checkpoint``, for :func:`ddpm_fast.load`."""
    parser.add_argument(
        "--checkpoint",
        default="digits",
        metavar="NAME|PATH",
        help="a bundled model or a checkpoint file (default: %(default)s)",
    )


def add_image_size(parser: argparse._ActionsContainer) -> None:
    """``--image-size``, which a model may know."""
    parser.add_argument(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help="height and width (default: what the model was made for)",
    )


def add_spacing(parser: argparse._ActionsContainer) -> None:
    """``--spacing``, beside ``--steps``."""
    parser.add_argument(
        "--spacing",
        choices=TIMESTEP_SPACINGS,
        default="trailing",
        help="which timesteps to take where they are fewer (default: %(default)s)",
    )


def add_seed(parser: argparse._ActionsContainer, same: str) -> None:
    """``--seed``, and what is the same with the same."""
    parser.add_argument(
        "--seed", type=int, default=0, help=f"the same seed, the same {same} (default: %(default)s)"
    )


def add_batch(parser: argparse._ActionsContainer, meaning: str) -> None:
    """``--batch``, of pictures."""
    parser.add_argument(
        "--batch", type=count, default=64, metavar="N", help=f"{meaning} (default: %(default)s)"
    )


def add_precision(parser: argparse._ActionsContainer) -> None:
    """``--precision``, of the network's arithmetic."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the network's arithmetic (default: %(default)s)",
    )


def count(text: str) -> int:
    """A number of things, at least 1, as argparse's ``type``."""
    return _integer(text, 1)


def index(text: str) -> int:
    """An index, at least 0, as argparse's ``type``."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
    return value
