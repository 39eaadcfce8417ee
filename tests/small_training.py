"""A training run of a second, and processes of it that a test can watch and kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast import GaussianDiffusion
from ddpm_fast.data import TensorDataset
from ddpm_fast.training import Recipe, TrainConfig, seeded_unet, train

QUICK = TrainConfig(
    num_steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=2, checkpoint_every=5
)


class Pictures(TensorDataset):
    """Ten 4x4 pictures of two classes, augmented; can call something before a given batch."""

    def __init__(self, augmented: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.rand(10, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(10) % 2, 2
        )
        self.augmented = augmented
        self.batches = 0
        self.seen: list[Tensor] = []
        self.before: dict[int, Callable[[], object]] = {}

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        self.before.get(self.batches, lambda: None)()
        self.batches += 1
        self.seen.append(indices)
        images, labels = super().batch(indices, generator)
        if self.augmented:
            images = images * torch.rand(len(images), 1, 1, 1, generator=generator)
        return images, labels


def quick_recipe(
    *,
    deterministic: bool = False,
    diffusion: GaussianDiffusion | None = None,
    **options: Any,
) -> Recipe:
    """A tiny recipe; ``deterministic`` has no dropout and no augmentation, drawn for each part."""
    diffusion = diffusion or GaussianDiffusion()
    model = seeded_unet(
        0,
        in_channels=1,
        out_channels=2 if diffusion.learns_variance else 1,
        image_size=4,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.0 if deterministic else 0.3,
        num_classes=2,
    )
    pictures = Pictures(augmented=not deterministic)
    return Recipe(model, diffusion, pictures, replace(QUICK, **options))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of each curve."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    tags: Iterable[str] = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


class Child:
    """A process that trains, batch by batch, as it is told to; it may be killed.

    Args:
        out: its checkpoint, which it resumes if it is there.
        environment: variables that it finds.
        log_dir: for TensorBoard.
        options: those of the recipe.
    """

    def __init__(
        self,
        out: Path,
        environment: dict[str, str] | None = None,
        log_dir: Path | None = None,
        **options: Any,
    ) -> None:
        self._batches, theirs = _CONTEXT.Pipe()
        arguments = (out, out.exists(), environment or {}, theirs, log_dir, options)
        self.process: ForkServerProcess = _CONTEXT.Process(target=_train, args=arguments)
        self.process.start()
        theirs.close()

    def goes_on(self, batches: int) -> bool:
        """Let it have as many more; False where it ends before."""
        try:
            for _ in range(batches):
                self._batches.recv()
                self._batches.send("go on")
        except EOFError:
            return False
        return True

    def release(self) -> None:
        """Let it have all others."""
        self._batches.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def exit_codes(*children: Child) -> list[int | None]:
    """Let them go on to their ends."""
    for child in children:
        child.release()
    for child in children:
        child.process.join()
    return [child.process.exitcode for child in children]


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    return [world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(count)]


def commands(
    line: str, environments: Iterable[dict[str, str]], folder: Path
) -> list[subprocess.Popen[str]]:
    """``ddpm-fast`` in a process for each environment; what it says on stderr can be read."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ddpm_fast", *line.split()],
            env=os.environ | environment,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]


def children(count: int, out: Path, **options: Any) -> list[Child]:
    return [Child(out, environment, **options) for environment in environments(count)]


class _Told(Pictures):
    """Pictures that are given out when the test that holds the other end says so."""

    def __init__(self, pictures: Pictures, test: Connection) -> None:
        super().__init__(pictures.augmented)
        self._test = test

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        with contextlib.suppress(EOFError, OSError):  # it has let go
            self._test.send(self.batches)
            self._test.recv()
        return super().batch(indices, generator)


def _train(
    out: Path,
    resume: bool,
    environment: dict[str, str],
    test: Connection,
    log_dir: Path | None,
    options: dict[str, Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    recipe = quick_recipe(**options)
    told = _Told(recipe.dataset, test)
    recipe = recipe._replace(dataset=told)
    train(*recipe, out=out, resume=resume, log_dir=log_dir, progress=False)


# Its server has imported torch once, and forks.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ddpm_fast.training"])
