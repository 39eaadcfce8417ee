"""``ddpm-fast train``."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from typing import Any

from ..diffusion import PREDICTION_TYPES, VARIANCE_TYPES
from ..losses import LOSSES
from ..memory import out_of_memory_as
from ..processes import Processes, processes
from ..schedules import BETA_SCHEDULES
from ..training import Recipe, TrainConfig, digits_recipe, folder_recipe, train
from ..training.config import LR_SCHEDULES, PRECISIONS
from ..training.recipes import DIGITS_OPTIONS
from .options import PROG, add_device, check_file_writable, count, device_named

SUMMARY = "train a model on the digits or on your pictures"
EXAMPLES = """\
  ddpm-fast train digits --out digits.safetensors
  ddpm-fast train photos/ --image-size 64 --classes-from-folders --out photos.safetensors
  ddpm-fast train samples.npz --label-column arr_1 --no-flip --out samples.safetensors
  ddpm-fast train digits --out digits.safetensors --resume
  ddpm-fast train digits --out digits.safetensors --log-dir logs --sample-every 500

on all GPUs of a machine:
  torchrun --nproc-per-node gpu -m ddpm_fast train photos/ --out photos.safetensors"""

# Each option of training.TrainConfig: its flag and its meaning.
TRAIN_OPTIONS = {
    "num_steps": ("--steps", "optimizer steps in the whole run"),
    "batch_size": ("--batch-size", "pictures per step"),
    "learning_rate": ("--lr", "Adam's learning rate"),
    "warmup_steps": ("--warmup-steps", "steps in which it rises from zero"),
    "grad_clip": ("--grad-clip", "largest norm of the gradient"),
    "ema_decay": ("--ema-decay", "decay of the averaged weights per step"),
    "label_dropout": ("--label-dropout", "share of labels hidden, for guidance"),
    "seed": ("--seed", "seed of everything random"),
    "checkpoint_every": ("--checkpoint-every", "steps between two checkpoints"),
    "lr_schedule": ("--lr-schedule", "after warm-up"),
    "ema_half_life": ("--ema-half-life", "pictures, instead of --ema-decay"),
    "loss": ("--loss", "of each pixel"),
    "min_snr_gamma": ("--min-snr-gamma", "weigh timesteps by min-SNR, often 5"),
    "offset_noise": ("--offset-noise", "noise shared by a channel, often 0.1"),
    "accumulate": ("--accumulate", "parts of a batch, one after the other"),
    "precision": ("--precision", "of the network"),
}
CHOICES = {"lr_schedule": LR_SCHEDULES, "loss": tuple(LOSSES), "precision": PRECISIONS}
DIFFUSION_OPTIONS = {
    "beta_schedule": (BETA_SCHEDULES, "how fast pictures are noised (default: linear)"),
    "prediction_type": (PREDICTION_TYPES, "what the network predicts (default: epsilon)"),
    "variance_type": (VARIANCE_TYPES, "of the reverse steps (default: fixed, by their number)"),
}
FOLDER_IMAGE_SIZE = 32
FOLDER_OPTIONS = (
    "image_size",
    "no_flip",
    "classes_from_folders",
    "image_column",
    "label_column",
    "channels",
    "model_channels",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "data",
        metavar="digits|PATH",
        help="scikit-learn's digits; or a folder of pictures, an .npz, or a folder that Hugging "
        "Face's datasets saved",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in FILE")
    add_device(parser)
    _add_recipe(parser.add_argument_group("recipe"))
    _add_diffusion(parser.add_argument_group("diffusion"))
    _add_logs(parser.add_argument_group("logs"))
    _add_folders(parser.add_argument_group("for pictures of your own"))


def _add_recipe(recipe: argparse._ArgumentGroup) -> None:
    for field in fields(TrainConfig):
        flag, meaning = TRAIN_OPTIONS[field.name]
        digits = DIGITS_OPTIONS.get(field.name, field.default)
        both = digits == field.default
        default = f"{digits}" if both else f"{digits} for digits, else {field.default}"
        recipe.add_argument(
            flag,
            dest=field.name,
            help=f"{meaning} (default: {'off' if digits is None else default})",
            **_values(field.name, digits),
        )


def _add_diffusion(diffusion: argparse._ArgumentGroup) -> None:
    for name, (choices, meaning) in DIFFUSION_OPTIONS.items():
        diffusion.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=meaning)


def _add_logs(logs: argparse._ArgumentGroup) -> None:
    logs.add_argument("--log-dir", metavar="DIR", help="curves for TensorBoard (default: none)")
    logs.add_argument(
        "--sample-every",
        type=count,
        metavar="N",
        help="steps between two grids of samples in DIR (default: none)",
    )


def _add_folders(folders: argparse._ArgumentGroup) -> None:
    folders.add_argument(
        "--image-size",
        type=count,
        metavar="PIXELS",
        help=f"height and width to train at (default: {FOLDER_IMAGE_SIZE})",
    )
    folders.add_argument(
        "--channels", type=int, choices=(1, 3), help="1 for grey, 3 for colour (default: 3)"
    )
    folders.add_argument(
        "--model-channels",
        type=count,
        metavar="N",
        help="width of the network: less is faster (default: 128)",
    )
    folders.add_argument(
        "--no-flip",
        action="store_true",
        default=None,
        help="for what reads one way only, such as writing (default: half of them are mirrored)",
    )
    folders.add_argument(
        "--classes-from-folders",
        action="store_true",
        default=None,
        help="the subfolders are the classes (default: no classes)",
    )
    folders.add_argument(
        "--image-column",
        metavar="NAME",
        help="the pictures of an .npz or of datasets (default: arr_0, or the only such column)",
    )
    folders.add_argument(
        "--label-column",
        metavar="NAME",
        help="the classes of an .npz or of datasets (default: no classes)",
    )


def _values(name: str, default: object) -> dict[str, Any]:
    """What an option of the recipe may be, as ``add_argument`` is told."""
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    if isinstance(default, int):
        return {"type": int, "metavar": "N"}
    return {"type": float, "metavar": "X"}


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for, as one of torchrun's processes or alone."""
    with processes() as group:
        _train(args, group)


def _train(args: argparse.Namespace, group: Processes) -> None:
    check_file_writable(args.out, "--out")

    device = device_named(args.device)
    recipe = _recipe(args)
    started = time.perf_counter()
    with out_of_memory_as(
        f"--batch-size {recipe.config.batch_size}: {device} has too little memory for so many"
        " pictures at a time; take fewer, or more parts with --accumulate"
    ):
        train(
            *recipe,
            out=args.out,
            resume=args.resume,
            device=device,
            log_dir=args.log_dir,
            sample_every=args.sample_every,
        )
    seconds = time.perf_counter() - started
    if group.leads:
        where = f"{device}" if group.count == 1 else f"{group.count} processes of {device.type}"
        print(
            f"{args.out}: trained to step {recipe.config.num_steps} on {where} in {seconds:.0f} s"
        )
        print(f"draw samples with: {PROG} sample --checkpoint {args.out}")


def _recipe(args: argparse.Namespace) -> Recipe:
    """What the data asks for, with the changes that the options make."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in TRAIN_OPTIONS if name in given}
    if {"ema_decay", "ema_half_life"} <= options.keys():
        raise ValueError("--ema-half-life is instead of --ema-decay; give one of them")
    diffusion = {name: given[name] for name in DIFFUSION_OPTIONS if name in given}
    if args.data == "digits":
        for name in FOLDER_OPTIONS:
            if name in given:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for other data; the digits have their own recipe")
        return digits_recipe(diffusion_options=diffusion, **options)
    network = {"in_channels": args.channels, "model_channels": args.model_channels}
    return folder_recipe(
        args.data,
        image_size=given.get("image_size", FOLDER_IMAGE_SIZE),
        flip=not args.no_flip,
        class_labels=bool(args.classes_from_folders),
        image_column=args.image_column,
        label_column=args.label_column,
        model_options={name: value for name, value in network.items() if value is not None},
        diffusion_options=diffusion,
        **options,
    )
