"""The command line, ``ddpm-fast train | sample | bench | info``: thin wrappers of the library."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from . import bench, image_io, info
from .atomic import atomic_write
from .checkpoint import BUNDLED, Loaded, load
from .diffusion import GaussianDiffusion
from .network import PRECISIONS
from .ops import BACKENDS, serves_natively
from .sampler import sample
from .schedules import TIMESTEP_SPACINGS
from .solvers import SAMPLERS
from .training import Recipe, digits_recipe, folder_recipe, train

PROG = "ddpm-fast"
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code.

    0 is success; 2 a mistaken option or bad input, told in one sentence on stderr; 130 an
    interruption by Ctrl-C. An option that cannot be parsed raises SystemExit(2), as argparse does.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args.run(args)
        except KeyboardInterrupt as interrupt:
            _say(str(interrupt) or "interrupted")
            return EXIT_INTERRUPTED
        except (FloatingPointError, ImportError, OSError, ValueError) as error:
            _say(f"error: {_sentence(error)}")
            return EXIT_BAD_INPUT
    return 0


def _say(message: str) -> None:
    print(f"{PROG}: {message}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # raised by the system, not by this package
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")


# --- sample -----------------------------------------------------------------------------------


def _sample(args: argparse.Namespace) -> None:
    kind = output_kind(args.out)
    check_writable(args.out)

    device = _device(args.device)
    native = _serves_natively(device, args.backend)
    model, diffusion = load(args.checkpoint, device=device)
    labels = _labels(model, args)
    started = time.perf_counter()
    batches = _batches(args, model, diffusion, labels, device)
    if kind == "folder":
        for first_index, images in batches:
            image_io.save_images(images, args.out, first_index=first_index)
    else:
        save = image_io.save_grid if kind == ".png" else image_io.save_npz
        save(torch.cat([images for _, images in batches]), args.out, labels=labels)
    seconds = time.perf_counter() - started

    steps = args.steps or diffusion.num_timesteps
    rate = steps * math.ceil(args.num / args.batch) / seconds
    backend = "native" if native else "reference"
    print(f"{args.out}: {args.num} samples of {args.checkpoint}, seed {args.seed}")
    print(
        f"{args.sampler} with {steps} steps, {backend} backend on {device}: "
        f"{seconds:.1f} s, {rate:.1f} steps/s"
    )


def _batches(
    args: argparse.Namespace,
    model: Loaded,
    diffusion: GaussianDiffusion,
    labels: list[int] | None,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Draw batch after batch; gives the index of its first sample, and its images on the CPU."""
    size = args.image_size or getattr(model, "image_size", None)
    if size is None:
        raise ValueError("this model draws pictures of any size: choose one with --image-size")
    one_batch = args.num <= args.batch  # its bar counts steps, that of many counts samples
    with tqdm(total=args.num, unit="sample", disable=True if one_batch else None) as bar:
        for start in range(0, args.num, args.batch):
            count = min(args.batch, args.num - start)
            try:
                images = sample(
                    model,
                    (count, model.in_channels, size, size),
                    diffusion=diffusion,
                    sampler=args.sampler,
                    num_steps=args.steps,
                    eta=args.eta,
                    timestep_spacing=args.spacing,
                    seed=args.seed,
                    first_index=args.first_index + start,
                    class_labels=None if labels is None else labels[start : start + count],
                    guidance_scale=args.guidance,
                    device=device,
                    precision=args.precision,
                    backend=args.backend,
                    progress=one_batch and sys.stderr.isatty(),
                )
            except torch.OutOfMemoryError:
                raise ValueError(
                    f"--batch {args.batch}: {device} has too little memory "
                    "for so many samples at a time"
                ) from None
            yield args.first_index + start, images.cpu()
            bar.update(count)


def output_kind(out: str) -> str:
    """What ``--out`` asks for: ".png" a grid, ".npz" an archive, "folder" a PNG per image.

    A folder is a path that ends in a slash, or one that exists as a folder.

    Raises:
        ValueError: any other path.
    """
    if _is_folder(out):
        return "folder"
    extension = Path(out).suffix
    if extension.lower() in (".png", ".npz"):
        return extension.lower()
    found = f"the extension {extension}" if extension else "no extension"
    raise ValueError(
        f"--out {out} has {found}; known are .png (a grid), .npz (arrays), "
        f"and a folder, written with a slash: {out}/"
    )


def _is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def check_writable(out: str) -> None:
    """Find out before the work is done whether the file or folder ``out`` can be written.

    Raises:
        ValueError: The folder of a file is missing, nothing can be written there, or a file or a
            folder of that name is in the way.
    """
    path = Path(out)
    if _is_folder(out):
        folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    elif path.exists() and not path.is_file():
        raise ValueError(f"--out {out} exists and is not a regular file")
    else:
        folder = path.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write in {folder}: {error.strerror}") from None


def parse_classes(text: str, num_classes: int) -> list[int]:
    """The classes that ``text`` lists, in its order: "3", "0-9", "1,7,7", "0-3,8".

    Raises:
        ValueError: ``text`` is not such a list, or a class is not below ``num_classes``.
    """
    classes: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if ends is None:
            raise ValueError(
                f"--classes {text}: {part!r} is neither a class, such as 3, "
                "nor a range, such as 0-9"
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if first > last:
            raise ValueError(f"--classes {text}: the range {part.strip()} runs backwards")
        if last >= num_classes:
            raise ValueError(f"--classes {text}: the classes of this model are 0-{num_classes - 1}")
        classes.extend(range(first, last + 1))
    return classes


def _labels(model: Loaded, args: argparse.Namespace) -> list[int] | None:
    """The class of each sample: those of ``--classes`` in turn, whatever the batch size.

    They go by the sample's index in the whole run, as its noise does, so that a run which begins
    at another ``--first-index`` continues the same pictures.
    """
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        if args.classes is not None:
            raise ValueError(f"--classes {args.classes}: this model has no classes")
        return None
    text = f"0-{num_classes - 1}" if args.classes is None else args.classes
    classes = parse_classes(text, num_classes)
    indices = range(args.first_index, args.first_index + args.num)
    return [classes[index % len(classes)] for index in indices]


def _serves_natively(device: torch.device, backend: str) -> bool:
    try:
        return serves_natively(device, backend)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _device(name: str | None) -> torch.device:
    """The device of that name, found to work; without a name the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


# --- train ------------------------------------------------------------------------------------

# Each option of training.TrainConfig: its flag, its meaning, and the recipes' values.
TRAIN_OPTIONS = {
    "num_steps": ("--steps", "optimizer steps in the whole run", 2_500, 800_000),
    "batch_size": ("--batch-size", "pictures per step", 128, 128),
    "learning_rate": ("--lr", "Adam's learning rate", 1e-3, 2e-4),
    "warmup_steps": ("--warmup-steps", "steps in which it rises from zero", 200, 5_000),
    "grad_clip": ("--grad-clip", "largest norm of the gradient", 1.0, 1.0),
    "ema_decay": ("--ema-decay", "decay of the averaged weights per step", 0.999, 0.9999),
    "label_dropout": ("--label-dropout", "share of labels hidden, for guidance", 0.1, 0.1),
    "seed": ("--seed", "seed of everything random", 0, 0),
    "checkpoint_every": ("--checkpoint-every", "steps between two checkpoints", 500, 5_000),
}
FOLDER_IMAGE_SIZE = 32
FOLDER_OPTIONS = ("image_size", "classes_from_folders", "channels", "model_channels")


def _train(args: argparse.Namespace) -> None:
    check_writable(args.out)

    device = _device(args.device)
    recipe = _recipe(args)
    started = time.perf_counter()
    train(*recipe, out=args.out, resume=args.resume, device=device)
    seconds = time.perf_counter() - started
    print(f"{args.out}: trained to step {recipe.config.num_steps} on {device} in {seconds:.0f} s")
    print(f"draw samples with: {PROG} sample --checkpoint {args.out}")


def _recipe(args: argparse.Namespace) -> Recipe:
    """What the data asks for, with the changes that the options make."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in TRAIN_OPTIONS if name in given}
    if args.data == "digits":
        for name in FOLDER_OPTIONS:
            if name in given:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for folders; the digits have their own recipe")
        return digits_recipe(**options)
    network = {"in_channels": args.channels, "model_channels": args.model_channels}
    return folder_recipe(
        args.data,
        image_size=given.get("image_size", FOLDER_IMAGE_SIZE),
        class_labels=bool(args.classes_from_folders),
        model_options={name: value for name, value in network.items() if value is not None},
        **options,
    )


# --- bench ------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_writable(args.json)
    device = _device(args.device)
    _serves_natively(device, "native")
    machine = bench.machine(device)
    progress = tqdm(bench.measure(device), disable=not sys.stderr.isatty(), leave=False)
    results = list(progress)
    print(f"ddpm_fast {machine['ddpm_fast']}, torch {machine['torch']}, on {machine['on']}")
    print("median time of a call, and that over the native one's; measured in turns\n")
    print(bench.table(results))
    if args.json is not None:
        rows = [result._asdict() for result in results]
        with atomic_write(args.json) as file:
            file.write(json.dumps({"machine": machine, "results": rows}, indent=2).encode())


# --- info -------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
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


# --- the parser -------------------------------------------------------------------------------

EXAMPLES = {
    "sample": """\
examples:
  ddpm-fast sample
  ddpm-fast sample --classes 1,7,7 --num 12 --seed 3 --out sevens.png
  ddpm-fast sample --num 1000 --sampler ddim --steps 50 --out samples.npz
  ddpm-fast sample --checkpoint cats.safetensors --num 256 --batch 32 --out cats/""",
    "train": """\
examples:
  ddpm-fast train digits --out digits.safetensors
  ddpm-fast train photos/ --image-size 64 --classes-from-folders --out photos.safetensors
  ddpm-fast train digits --out digits.safetensors --resume""",
    "bench": """\
examples:
  ddpm-fast bench
  ddpm-fast bench --device cuda --json bench.json""",
    "info": """\
examples:
  ddpm-fast info
  ddpm-fast info --json""",
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in the form of all other errors, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{PROG}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description="Draw samples from diffusion models, and train them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> _Parser:
        added: _Parser = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _add_sample_options(command("sample", _sample, "draw samples and write them as pictures"))
    _add_train_options(command("train", _train, "train a model on the digits or on your pictures"))
    parser_of_bench = command(
        "bench", _bench, "measure the kernels beside eager PyTorch and the fallback, in a minute"
    )
    _add_device(parser_of_bench)
    parser_of_bench.add_argument(
        "--json", metavar="FILE", help="write the measurements there too, in seconds"
    )
    parser_of_info = command(
        "info", _info, "tell versions, the backend of each device, bundled models"
    )
    parser_of_info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--checkpoint",
        default="digits",
        metavar="NAME|PATH",
        help="a bundled model or a checkpoint file (default: %(default)s)",
    )
    what.add_argument(
        "--num",
        type=_count,
        default=64,
        metavar="N",
        help="number of samples (default: %(default)s)",
    )
    what.add_argument(
        "--classes",
        metavar="LIST",
        help="the classes to take in turn, such as 3 or 0-9 or 1,7,7 (default: all the model has)",
    )
    what.add_argument(
        "--seed", type=int, default=0, help="the same seed, the same samples (default: %(default)s)"
    )
    what.add_argument(
        "--first-index",
        type=_index,
        default=0,
        metavar="N",
        help="index of the first sample: a run can be drawn in parts (default: %(default)s)",
    )
    what.add_argument(
        "--image-size",
        type=_count,
        metavar="PIXELS",
        help="height and width (default: what the model was made for)",
    )

    how = parser.add_argument_group("how to draw")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(default: %(default)s)")
    how.add_argument(
        "--steps", type=_count, metavar="N", help="sampling steps (default: all the model's)"
    )
    how.add_argument(
        "--eta",
        type=float,
        default=0.0,
        help="noise of ddim: 0 none, 1 as much as ddpm (default: %(default)s)",
    )
    how.add_argument(
        "--spacing",
        choices=TIMESTEP_SPACINGS,
        default="trailing",
        help="which timesteps to take where they are fewer (default: %(default)s)",
    )
    how.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance: above 1 sharpens the class (default: none)",
    )

    where = parser.add_argument_group("where")
    where.add_argument(
        "--out",
        default="samples.png",
        metavar="PATH",
        help=".png: one grid; .npz: arrays; a folder, written with a slash: a PNG per sample "
        "(default: %(default)s)",
    )
    where.add_argument(
        "--batch",
        type=_count,
        default=64,
        metavar="N",
        help="samples drawn at a time; changes no picture (default: %(default)s)",
    )
    _add_device(where)
    where.add_argument(
        "--precision", choices=PRECISIONS, help="of the network's arithmetic (default: fp32)"
    )
    where.add_argument("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="digits|PATH", help="scikit-learn's digits, or a folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in FILE")
    _add_device(parser)

    recipe = parser.add_argument_group("recipe")
    for name, (flag, meaning, digits, folder) in TRAIN_OPTIONS.items():
        default = f"{digits}" if digits == folder else f"{digits} for digits, else {folder}"
        recipe.add_argument(
            flag,
            dest=name,
            type=type(digits),
            metavar="N" if isinstance(digits, int) else "X",
            help=f"{meaning} (default: {default})",
        )

    folders = parser.add_argument_group("for folders")
    folders.add_argument(
        "--image-size",
        type=_count,
        metavar="PIXELS",
        help=f"height and width to train at (default: {FOLDER_IMAGE_SIZE})",
    )
    folders.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 for grey, 3 for colour (default: 3)"
    )
    folders.add_argument(
        "--model-channels",
        type=_count,
        metavar="N",
        help="width of the network: less is faster (default: 128)",
    )
    folders.add_argument(
        "--classes-from-folders",
        action="store_true",
        default=None,
        help="the subfolders are the classes (default: no classes)",
    )


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")


def _count(text: str) -> int:
    return _integer(text, 1)


def _index(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
    return value
