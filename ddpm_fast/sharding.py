"""Many samples, drawn in shards by any number of processes, through any number of interruptions."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from . import ops
from .conditioning import Labels, checked_labels
from .diffusion import GaussianDiffusion
from .image_io import to_uint8
from .memory import out_of_memory_as
from .processes import Processes, processes
from .reference import NOISE_LAYOUT
from .sampler import Sampler, checked_first_index
from .shards import Run, ShardFolder, described, difference
from .solvers import Spacing


def sample_sharded(
    model: nn.Module,
    shape: Sequence[int],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 256,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex = 0,
    first_index: SupportsIndex = 0,
    class_labels: Labels | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    device: torch.device | str | None = None,
    precision: str | None = None,
    compile: bool = False,
    backend: str = "auto",
    progress: bool = False,
) -> Path:
    """Draw samples into a folder of shards, and then into one file of them all, ``samples.npz``.

    A script under torchrun shares the work among all its processes, each of which must make this
    call; the folder must be one that all of them see. (Where ``torch.distributed`` has a default
    group already, it is that one.) A shard is one batch, so the files' bytes depend neither on the
    number of processes nor on who drew what. It is written whole or not at all: the same call
    after an interruption, or a kill, draws only what is missing, or is not as it was written. Once
    ``samples.npz`` is there, ``shards/`` may be deleted; the same call then draws all anew.

    Args:
        model: a module, as :func:`ddpm_fast.sample` takes it, the same in every process. A run is
            resumed only with the class, configuration and weights that it began with.
        shape: ``(num, C, H, W)`` of all samples.
        out: the folder; made where it is missing. :mod:`ddpm_fast.shards` tells what it holds.
        shard_size: samples in a shard, which are drawn at a time.
        seed: in [0, 2**64).
        class_labels: the class of each sample, ``[num]``, or one for all.
        guidance_scale: one number for all samples and steps.
        device: where this process computes; the model's by default.
        progress: show a progress bar, of all processes, in the first of them.

    The others are those of :func:`ddpm_fast.sample`.

    Returns:
        The path of ``samples.npz``: what ``image_io.save_npz`` makes of the samples and labels.

    Raises:
        ValueError: an argument out of range or unknown, or a folder that holds another run, before
            any work; samples that are NaN; a device with too little memory.
        TypeError: an argument of another type, likewise.
        OSError: a file cannot be written; those that were are whole.
        OtherProcessError: another process raised one of these.
        ConnectionError: another process has ended, or can no longer be reached.
        KeyboardInterrupt: on Ctrl-C, telling how to go on.
    """
    options = {
        "diffusion": diffusion or GaussianDiffusion(),
        "sampler": sampler,
        "num_steps": num_steps,
        "eta": eta,
        "timestep_spacing": timestep_spacing,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "device": device,
        "precision": precision,
        "compile": compile,
        "backend": backend,
    }
    try:
        with processes() as group:
            with group.together():
                samples = _Samples(
                    model, shape, shard_size, seed, first_index, class_labels, options
                )
                folder = ShardFolder(out, samples.run)
            missing = _prepare(folder, group)
            _draw(samples, folder, missing, group, progress)
            with group.together():
                if group.leads:
                    folder.merge()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the same command goes on with what is in {out}"
        ) from None
    return folder.merged


def _prepare(folder: ShardFolder, group: Processes) -> list[range]:
    """The shards that are missing in the folder, once it is found to be of the run of them all."""
    runs = group.gather(folder.run.description())
    missing: list[range] = []
    with group.together():
        different = difference(runs[group.rank], runs[0])
        if different is not None:
            name, ours, theirs = different
            raise ValueError(f"its {name} is {ours}, that of process 0 is {theirs}")
        if group.leads:
            folder.prepare()
            missing = folder.missing()
    return group.gather(missing)[0]


def _draw(
    samples: _Samples, folder: ShardFolder, missing: list[range], group: Processes, progress: bool
) -> None:
    """Draw what is missing, in turns of a shard for each process."""
    total = folder.run.num
    done = total - sum(map(len, missing))
    silent = not progress or not group.leads
    with tqdm(total=total, initial=done, unit="sample", disable=silent) as bar:
        for turn in turns(missing, group.count):
            with group.together():
                if group.rank < len(turn):
                    shard = turn[group.rank]
                    folder.write(shard, samples.draw(shard))
            bar.update(sum(map(len, turn)))


def turns(missing: Sequence[range], count: int) -> list[Sequence[range]]:
    """The ``missing`` shards, as many at a time as ``count`` processes draw."""
    return [missing[i : i + count] for i in range(0, len(missing), count)]


class _Samples:
    """The samples of a run, by their indices; all is checked before any is drawn.

    Attributes:
        run: what decides them.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        shard_size: int,
        seed: SupportsIndex,
        first_index: SupportsIndex,
        class_labels: Labels | None,
        options: dict[str, Any],
    ) -> None:
        _check_kinds(model, options["sampler"], options["guidance_scale"])
        num, *image_shape = _checked_shape(shape)
        if operator.index(shard_size) < 1:
            raise ValueError(f"sample_sharded: shard_size must be at least 1; got {shard_size}")
        if options["guidance_scale"] is not None and class_labels is None:
            raise ValueError("guidance_scale needs class_labels to guide towards")
        ops.seed_tensor(seed, "cpu")
        labels = None if class_labels is None else checked_labels(class_labels, num, model).tolist()
        self._model, self._options = model, options
        self._image_shape = tuple(image_shape)
        self._samplers: dict[int, Sampler] = {}
        self._too_large = (
            f"shard_size {shard_size}: the device has too little memory"
            " for so many samples at a time"
        )
        with out_of_memory_as(self._too_large):
            table = self._sampler(min(num, shard_size)).table
        scale, spacing = options["guidance_scale"], options["timestep_spacing"]
        self.run = Run(
            model=described(model),
            diffusion=options["diffusion"].config(),
            num=num,
            image_shape=self._image_shape,
            shard_size=operator.index(shard_size),
            seed=operator.index(seed),
            first_index=checked_first_index(first_index, num),
            class_labels=labels,
            sampler=options["sampler"],
            num_steps=len(table),
            eta=float(options["eta"]),
            timestep_spacing=spacing if isinstance(spacing, str) else [int(t) for t in spacing],
            guidance_scale=None if scale is None else float(scale),
            guidance_rescale=float(options["guidance_rescale"]),
            precision=options["precision"],
            compile=options["compile"],
            noise_layout=NOISE_LAYOUT,
        )

    def draw(self, shard: range) -> npt.NDArray[np.uint8]:
        """The images of a shard, uint8 [N, H, W, C]."""
        with out_of_memory_as(self._too_large):
            images = self._sampler(len(shard))(
                seed=self.run.seed, first_index=shard[0], class_labels=self.run.labels(shard)
            )
        return to_uint8(images)

    def _sampler(self, count: int) -> Sampler:
        """The sampler of shards of a size, of which a run has two at most."""
        if count not in self._samplers:
            shape = (count, *self._image_shape)
            self._samplers[count] = Sampler(self._model, shape, **self._options)
        return self._samplers[count]


def _check_kinds(model: object, sampler: object, guidance_scale: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            "sample_sharded: model must be a torch.nn.Module, whose weights tell whether a resumed"
            f" run is the same; got {type(model).__name__}"
        )
    if not isinstance(sampler, str):
        raise TypeError(
            f"sample_sharded: sampler must be the name of one; got {type(sampler).__name__}"
        )
    try:
        float(0 if guidance_scale is None else guidance_scale)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"sample_sharded: guidance_scale must be one number; got {guidance_scale!r}"
        ) from None


def _checked_shape(shape: Sequence[int]) -> list[int]:
    sizes = [operator.index(size) for size in shape]
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(
            f"sample_sharded: shape must be (num, C, H, W), each at least 1; got {tuple(shape)}"
        )
    return sizes
