"""A folder of shards: the samples of a run in files that are each whole and of this run, or redone.

    run.json                      what the run is: everything that decides its samples
    shards/000000-000255.npz      samples 0 ... 255 of it, as image_io.save_npz would write them
    samples.npz                   all of them, in one

A shard ends in a seal, the SHA-256 of its bytes, its name and the run. The seal stands where a zip
archive has its comment, so that numpy reads a shard as it reads any npz.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .atomic import atomic_write, remove_all_leftovers, remove_leftovers
from .image_io.npz import write_npz

_SEAL_SIZE = 2 * hashlib.sha256().digest_size  # in hexadecimal digits


@dataclass(frozen=True)
class Run:
    """Everything that decides the samples of a run, JSON-able.

    The device is not among it: a run may go on elsewhere, up to the network's rounding.

    Attributes:
        model: as :func:`described` gives it.
        diffusion: as :meth:`GaussianDiffusion.config` gives it.
        num: the number of samples.
        image_shape: their channels, height and width.
        shard_size: samples in a shard, and in a batch.
        class_labels: the class of each sample.
        noise_layout: the version of docs/noise.md.

    The others are the options of :func:`ddpm_fast.sample`.
    """

    model: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    num: int
    image_shape: tuple[int, ...]
    shard_size: int
    seed: int
    first_index: int
    class_labels: list[int] | None
    sampler: str
    num_steps: int
    eta: float
    timestep_spacing: str | list[int]
    guidance_scale: float | None
    guidance_rescale: float
    precision: str | None
    compile: bool
    noise_layout: int

    def description(self) -> dict[str, Any]:
        """The run as it is read back from JSON."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return described

    def fingerprint(self) -> str:
        """The SHA-256 of the description."""
        text = json.dumps(self.description(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self) -> list[range]:
        """The samples of each shard, by their index."""
        indices = range(self.first_index, self.first_index + self.num)
        return [indices[i : i + self.shard_size] for i in range(0, self.num, self.shard_size)]

    def labels(self, shard: range) -> list[int] | None:
        """The classes of a shard's samples."""
        if self.class_labels is None:
            return None
        return self.class_labels[shard.start - self.first_index : shard.stop - self.first_index]


class ShardFolder:
    """The files of a run in a folder.

    Attributes:
        run: the run.
        merged: the file that holds all samples in the end.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Run) -> None:
        self.run = run
        self.merged = Path(folder) / "samples.npz"
        self._folder, self._shards = Path(folder), Path(folder) / "shards"
        self._fingerprint = run.fingerprint()

    def path(self, shard: range) -> Path:
        """The file of a shard."""
        return self._shards / f"{shard[0]:06d}-{shard[-1]:06d}.npz"

    def prepare(self) -> None:
        """Make the folder, or find out that it is of this run; remove what a killed one left.

        Raises:
            ValueError: it holds samples of another run, or such as nothing is known of, or a
                run.json that is not as this version writes it.
            OSError: it cannot be written.
        """
        about = self._folder / "run.json"
        has_samples = self.merged.exists() or any(self._shards.glob("*.npz"))
        if about.exists():
            found = _read_description(about)
            if has_samples:
                self._check_is_of_this_run(found)
        elif has_samples:
            raise ValueError(
                f"{self._folder}: holds samples, and no run.json that says of what run;"
                " choose another folder"
            )
        self._shards.mkdir(parents=True, exist_ok=True)
        for path in (about, self.merged):
            remove_leftovers(path)
        remove_all_leftovers(self._shards)
        if not has_samples:
            with atomic_write(about) as file:
                file.write(_readable(self.run.description()).encode())

    def missing(self) -> list[range]:
        """The shards that are not there; one that is not as it was written counts as such."""
        # Listed, not opened one by one: a network's file system may remember for a while that a
        # file was not there, when another machine has written it.
        present = {path.name for path in self._shards.iterdir()}
        return [
            shard
            for shard in self.run.shards()
            if self.path(shard).name not in present or self._is_damaged(shard)
        ]

    def write(self, shard: range, images: npt.NDArray[np.uint8]) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: the indices of its samples.
            images: uint8 [N, H, W, C].

        Raises:
            OSError: it cannot be written.
        """
        buffer = io.BytesIO()
        write_npz(buffer, [images], len(images), self.run.labels(shard))
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = bytes(_SEAL_SIZE)
        content = buffer.getvalue()[:-_SEAL_SIZE]
        with atomic_write(self.path(shard)) as file:
            file.write(content + self._seal(shard, content))

    def merge(self) -> None:
        """Write all samples into one file, byte for byte that of ``image_io.save_npz``.

        One shard at a time is in memory.

        Raises:
            ValueError: a shard is not as it was written.
            OSError: a shard is missing, or the file cannot be written.
        """
        parts = map(self._images, self.run.shards())
        with atomic_write(self.merged) as file:
            write_npz(file, parts, self.run.num, self.run.class_labels)

    def _is_damaged(self, shard: range) -> bool:
        try:
            self._content(shard)
        except ValueError as error:
            warnings.warn(f"{error}; it is drawn again", stacklevel=3)
            return True
        return False

    def _images(self, shard: range) -> npt.NDArray[np.uint8]:
        with np.load(io.BytesIO(self._content(shard))) as archive:
            images: npt.NDArray[np.uint8] = archive["arr_0"]
        return images

    def _content(self, shard: range) -> bytes:
        content = self.path(shard).read_bytes()
        if content[-_SEAL_SIZE:] != self._seal(shard, content[:-_SEAL_SIZE]):
            raise ValueError(f"{self.path(shard)}: cut short, altered, or of another run")
        return content

    def _seal(self, shard: range, content: bytes) -> bytes:
        digest = hashlib.sha256(f"{self._fingerprint} {self.path(shard).name}\n".encode())
        digest.update(content)
        return digest.hexdigest().encode()

    def _check_is_of_this_run(self, found: Mapping[str, Any]) -> None:
        different = difference(self.run.description(), found)
        if different is not None:
            name, ours, theirs = different
            raise ValueError(
                f"{self._folder}: cannot be resumed: its {name} is {theirs}, this run's is {ours};"
                " give the same options, or another folder"
            )


def described(model: nn.Module) -> dict[str, Any]:
    """A model's class, its configuration where it has one, and a digest of its weights."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "architecture": type(model).__name__,
        "config": config() if callable(config) else None,
        "weights": digest.hexdigest(),
    }


def _read_description(path: Path) -> Mapping[str, Any]:
    """What a run.json says, which is one only with a run's own keys."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != {field.name for field in fields(Run)}:
        raise ValueError(
            f"{path}: damaged, or not as this version writes it; choose another folder"
        )
    return found


def _readable(description: Mapping[str, Any]) -> str:
    """JSON with a line for each member."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in description.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


class _Missing:
    """Stands for a value that only the other one has."""

    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values, ours and theirs, differ first, or None.

    As ``("diffusion.beta_end", 0.02, 0.03)``, behind the name of the two. They are compared as
    they are written, as the fingerprint is made: 2 is not 2.0, nor is null what is not there.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        parts = [
            (f"{name}.{key}".strip("."), ours.get(key, _MISSING), theirs.get(key, _MISSING))
            for key in keys
        ]
    elif isinstance(ours, list) and isinstance(theirs, list):
        pairs = enumerate(zip_longest(ours, theirs, fillvalue=_MISSING))
        parts = [(f"{name}[{i}]", our, their) for i, (our, their) in pairs]
    else:
        return None if repr(ours) == repr(theirs) else (name, ours, theirs)
    found = (difference(our, their, part) for part, our, their in parts)
    return next((different for different in found if different is not None), None)
