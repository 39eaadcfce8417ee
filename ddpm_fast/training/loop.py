"""The training loop: steps, and now and then a look at the loss, a checkpoint, pictures."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from .. import checkpoint
from ..atomic import remove_leftovers
from ..data import Dataset
from ..diffusion import GaussianDiffusion
from ..processes import local_device, processes
from .config import TrainConfig
from .interruption import Interruption
from .logs import Log, check_can_log, draw_samples
from .run import Run

_CHECK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


def train(
    model: checkpoint.Network,
    diffusion: GaussianDiffusion,
    dataset: Dataset,
    config: TrainConfig,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    log_dir: str | os.PathLike[str] | None = None,
    sample_every: int | None = None,
) -> Path:
    """Train ``model`` in place and write checkpoints to ``out``.

    A checkpoint is written every ``config.checkpoint_every`` steps and at the end, whole or not at
    all. Ctrl-C finishes the step under way, writes one more and raises KeyboardInterrupt.

    Under torchrun, or in a default group of ``torch.distributed``, the processes divide each batch
    among them, and the first one writes. A failure of one ends all. There Ctrl-C stops at once, and
    the last checkpoint is where to resume.

    Args:
        model: a :class:`UNet` or :class:`LightweightUNet`; left in training mode, with its trained
            (not averaged) weights. ``ddpm_fast.load(out)`` has the averaged ones.
        diffusion: what it learns to reverse.
        dataset: its pictures.
        config: the options.
        out: the checkpoint file.
        resume: continue from ``out``, up to ``config.num_steps``, on any number of processes.
        device: where to train; by default where the model is. Under torchrun ``cuda`` is a GPU for
            each process.
        progress: show loss and throughput while stderr is a terminal.
        log_dir: a folder for TensorBoard: loss, gradient norm, learning rate and pictures a
            second, every 50 steps.
        sample_every: steps between two grids of samples in ``log_dir``, always of the same seed,
            from the averaged weights: in TensorBoard, and as PNG files.

    Returns:
        The path of the checkpoint.

    Raises:
        FileExistsError: ``out`` exists and ``resume`` is False.
        FileNotFoundError: there is nothing to resume, or the folder of ``out`` is missing.
        ValueError: an unfit model, data set or checkpoint.
        ModuleNotFoundError: ``log_dir`` is given and TensorBoard is not installed.
        FloatingPointError: loss or gradient became NaN or infinite; ``out`` keeps its last
            checkpoint from before.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
        OtherProcessError: under torchrun, another process failed, and raises one of the above.
        ConnectionError: under torchrun, another process has ended, or can no longer be reached.
    """
    out = Path(out)
    check_can_log(model, log_dir, sample_every)
    with processes() as group:
        where = next(model.parameters()).device if device is None else torch.device(device)
        run = Run(model, diffusion, dataset, config, local_device(where), group)
        if resume:
            run.restore(out)
        elif out.exists():
            raise FileExistsError(f"{out}: exists already; resume it, or choose another path")
        elif not out.parent.is_dir():
            raise FileNotFoundError(f"{out}: its folder does not exist")
        steps = group.gather(run.step)  # also, nobody writes before all have looked
        if len(set(steps)) > 1:
            raise ValueError(f"{out}: the processes have read different files, of steps {steps}")
        if group.leads:
            remove_leftovers(out)
        log = Log(log_dir, run.step) if log_dir is not None and group.leads else None
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            _loop(run, out, progress and group.leads, log, sample_every)
        group.gather(run.step)  # the file is there when any process returns
    return out


def _loop(run: Run, out: Path, progress: bool, log: Log | None, sample_every: int | None) -> None:
    config, started = run.config, time.perf_counter()
    bar = tqdm(
        total=config.num_steps,
        initial=run.step,
        desc="training",
        unit="step",
        disable=None if progress else True,
    )
    seen = run.step
    with bar, log or nullcontext(), Interruption(handles=run.group.count == 1) as interruption:
        while run.step < config.num_steps:
            run.advance()
            bar.update()
            saves = run.step % config.checkpoint_every == 0 or run.step == config.num_steps
            samples = sample_every is not None and run.step % sample_every == 0
            if saves or samples or interruption.requested or run.step % _CHECK_EVERY == 0:
                recent = run.recent()
                rate = (run.step - seen) * config.batch_size / (time.perf_counter() - started)
                bar.set_postfix(loss=f"{recent.loss:.4f}", images_per_s=f"{rate:.0f}")
                if saves or interruption.requested:
                    run.save(out)
                if log is not None:
                    log.scalars(run, recent, rate)
                if log is not None and samples:
                    log.pictures(run.step, *draw_samples(run))
                seen, started = run.step, time.perf_counter()
            if interruption.requested:
                raise KeyboardInterrupt(
                    f"training stopped at step {run.step} of {config.num_steps}; resume {out}"
                )
