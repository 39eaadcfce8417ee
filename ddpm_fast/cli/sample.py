"""``ddpm-fast sample``."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import image_io
from ..checkpoint import Loaded
from ..diffusion import GaussianDiffusion
from ..image_io.animation import ANIMATIONS
from ..memory import out_of_memory_as
from ..ops import BACKENDS
from ..processes import launched, processes
from ..sampler import sample
from ..sharding import sample_sharded
from ..solvers import SAMPLERS
from .film import Film, add_film, check_film
from .options import (
    add_batch,
    add_checkpoint,
    add_device,
    add_image_size,
    add_precision,
    add_seed,
    add_spacing,
    check_file_writable,
    check_folder_writable,
    count,
    device_named,
    index,
    loaded,
    output_kind,
    uses_native,
)

SUMMARY = "draw samples and write them as pictures"
EXAMPLES = """\
  ddpm-fast sample
  ddpm-fast sample --classes 1,7,7 --num 12 --seed 3 --out sevens.png
  ddpm-fast sample --num 16 --out denoising.gif --frames 60
  ddpm-fast sample --num 6 --strip denoising.png
  ddpm-fast sample --num 1000 --sampler ddim --steps 50 --out samples.npz
  ddpm-fast sample --checkpoint cats.safetensors --num 256 --batch 32 --out cats/
  ddpm-fast sample --num 50000 --sampler ddim --steps 50 --shard-size 500 --out run/

Under torchrun all its processes, and GPUs, share a run; the same command goes on with one that was
interrupted:
  torchrun --nproc-per-node 8 -m ddpm_fast sample --num-samples 50000 --out run/"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_argument_group("what to draw")
    add_checkpoint(what)
    what.add_argument(
        "--num",
        "--num-samples",  # torchrun takes --num for an abbreviation of an option of its own
        type=count,
        default=64,
        metavar="N",
        help="number of samples (default: %(default)s)",
    )
    what.add_argument(
        "--classes",
        metavar="LIST",
        help="the classes to take in turn, such as 3 or 0-9 or 1,7,7 (default: all the model has)",
    )
    add_seed(what, "samples")
    what.add_argument(
        "--first-index",
        type=index,
        default=0,
        metavar="N",
        help="index of the first sample: a run can be drawn in parts (default: %(default)s)",
    )
    add_image_size(what)

    how = parser.add_argument_group("how to draw")
    how.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(default: %(default)s)")
    how.add_argument(
        "--steps", type=count, metavar="N", help="sampling steps (default: all the model's)"
    )
    how.add_argument(
        "--eta",
        type=float,
        default=0.0,
        help="noise of ddim: 0 none, 1 as much as ddpm (default: %(default)s)",
    )
    add_spacing(how)
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
        help=".png: one grid; .gif, .webp: the denoising, animated; .npz: arrays; a folder, "
        "written with a slash: a PNG per sample (default: %(default)s)",
    )
    add_film(where)
    add_batch(where, "samples drawn at a time; changes no picture")
    where.add_argument(
        "--shard-size",
        type=count,
        metavar="N",
        help="write into the folder PATH shards of N samples, each drawn at a time, and from them "
        "samples.npz; skip the shards that are there (default under torchrun: --batch)",
    )
    add_device(where)
    add_precision(where)
    where.add_argument("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if args.shard_size is not None or launched():
        _run_sharded(args)
        return
    kind = output_kind(args.out)
    check = check_folder_writable if kind == "folder" else check_file_writable
    check(args.out, "--out")
    check_film(args, kind)

    device = device_named(args.device)
    native = uses_native(device, args.backend)
    model, diffusion = loaded(args.checkpoint, device)
    _check_channels(model, args, kind)
    labels = _labels(model, args)
    started = time.perf_counter()
    film = Film(args, kind, args.steps or diffusion.num_timesteps)
    batches = _batches(args, model, diffusion, labels, device, film)
    if kind == "folder":
        for first_index, images in batches:
            image_io.save_images(images, args.out, first_index=first_index)
    else:
        drawn = torch.cat([images for _, images in batches])
        if kind in ANIMATIONS:
            film.save_animation(args.out, labels)
        else:
            save = image_io.save_grid if kind == ".png" else image_io.save_npz
            save(drawn, args.out, labels=labels)
    if args.strip is not None:
        film.save_strip(args.strip, labels)
    seconds = time.perf_counter() - started

    steps = args.steps or diffusion.num_timesteps
    rate = steps * math.ceil(args.num / args.batch) / seconds
    backend = "native" if native else "reference"
    print(f"{args.out}: {args.num} samples of {args.checkpoint}, seed {args.seed}")
    if args.strip is not None:
        print(f"{args.strip}: their denoising in {film.columns} moments")
    print(
        f"{args.sampler} with {steps} steps, {backend} backend on {device}: "
        f"{seconds:.1f} s, {rate:.1f} steps/s"
    )


def _check_channels(model: Loaded, args: argparse.Namespace, kind: str) -> None:
    """Refuse to draw what cannot be painted, such as latents."""
    if model.in_channels not in (1, 3) and (kind != ".npz" or args.strip is not None):
        raise ValueError(
            f"this model draws {model.in_channels} channels, and pictures have 1 or 3: "
            "take --out FILE.npz, and no --strip"
        )


def _batches(
    args: argparse.Namespace,
    model: Loaded,
    diffusion: GaussianDiffusion,
    labels: list[int] | None,
    device: torch.device,
    film: Film,
) -> Iterator[tuple[int, Tensor]]:
    """Draw batch after batch; gives the index of its first sample, and its images on the CPU."""
    size = _size(model, args)
    one_batch = args.num <= args.batch  # its bar counts steps, that of many counts samples
    with tqdm(total=args.num, unit="sample", disable=True if one_batch else None) as bar:
        for start in range(0, args.num, args.batch):
            count = min(args.batch, args.num - start)
            with out_of_memory_as(
                f"--batch {args.batch}: {device} has too little memory"
                " for so many samples at a time"
            ):
                drawn = sample(
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
                    return_intermediates=film.moments,
                )
            yield args.first_index + start, film.take(drawn).cpu()
            bar.update(count)


def _run_sharded(args: argparse.Namespace) -> None:
    """Draw into a folder of shards, together with the other processes that torchrun started."""
    with processes() as group:
        with group.together():
            folder = _shard_folder(args)
            device = device_named(args.device)
            native = uses_native(device, args.backend)
            model, diffusion = loaded(args.checkpoint, device)
            labels = _labels(model, args)
            size = _size(model, args)
        started = time.perf_counter()
        merged = sample_sharded(
            model,
            (args.num, model.in_channels, size, size),
            folder,
            shard_size=args.shard_size or args.batch,
            diffusion=diffusion,
            sampler=args.sampler,
            num_steps=args.steps,
            eta=args.eta,
            timestep_spacing=args.spacing,
            seed=args.seed,
            first_index=args.first_index,
            class_labels=labels,
            guidance_scale=args.guidance,
            device=device,
            precision=args.precision,
            backend=args.backend,
            progress=sys.stderr.isatty(),
        )
        seconds = time.perf_counter() - started
    if group.leads:
        backend = "native" if native else "reference"
        print(f"{merged}: {args.num} samples of {args.checkpoint}, seed {args.seed}")
        print(f"{group.count} x {device.type}, {backend} backend: {seconds:.1f} s")


def _shard_folder(args: argparse.Namespace) -> str:
    """``--out`` as the folder of a sharded run, which needs no slash and shows no film."""
    out: str = args.out
    if Path(out).suffix.lower() in (".png", ".npz", *ANIMATIONS) and not Path(out).is_dir():
        raise ValueError(f"--out {out}: shards are written into a folder; give one, such as run/")
    if args.strip is not None or args.frames is not None:
        raise ValueError("--strip and --frames are for a run in one piece, not for one of shards")
    check_folder_writable(out, "--out")
    return out


def _size(model: Loaded, args: argparse.Namespace) -> int:
    size: int | None = args.image_size or getattr(model, "image_size", None)
    if size is None:
        raise ValueError("this model draws pictures of any size: choose one with --image-size")
    return size


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
