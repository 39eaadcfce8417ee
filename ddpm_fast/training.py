"""Training: the L_simple loop of Ho et al. 2020 (arXiv 2006.11239, algorithm 1), resumable.

Everything random in step ``s`` is a function of (seed, s) alone: the batch, the timesteps, label
dropout, augmentation and the network's dropout come from generators seeded with them, the noise
from the library's counter. So a checkpoint holds no random state, and a run that was stopped and
resumed computes what the uninterrupted one would have: bit for bit on the CPU with the same number
of threads, and as far as its kernels are deterministic on other devices.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .data import Dataset, digits, open_dataset
from .diffusion import GaussianDiffusion
from .models import UNet

_CHECK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device
_MAY_CHANGE_ON_RESUME = ("num_steps", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run; the defaults are the paper's for CIFAR-10 (appendix B).

    Attributes:
        num_steps: optimizer steps in the whole run.
        batch_size: pictures per step.
        learning_rate: Adam's, after warm-up.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        grad_clip: largest norm of the gradient.
        ema_decay: decay per step of the averaged weights, approached from below by a warm-up:
            step s uses at most (1 + s) / (10 + s).
        label_dropout: share of labels replaced by the null label, for classifier-free guidance
            (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).
        seed: of everything random.
        checkpoint_every: steps between two checkpoints.

    Raises:
        ValueError: a value is out of range.
    """

    num_steps: int = 800_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 5_000
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 5_000

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate", "grad_clip", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig: {name} must be above 0; got {getattr(self, name)}")
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"TrainConfig: {name} must not be negative; got {getattr(self, name)}"
                )
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"TrainConfig: {name} must be in [0, 1]; got {getattr(self, name)}"
                )


class Recipe(NamedTuple):
    """What :func:`train` takes first: ``train(*recipe, out=...)``."""

    model: UNet
    diffusion: GaussianDiffusion
    dataset: Dataset
    config: TrainConfig


def digits_recipe(**options: Any) -> Recipe:
    """How the bundled model ``"digits"`` was trained, on the half ``"train"`` of the digits.

    Args:
        options: fields of :class:`TrainConfig` to change; with none the recipe is the bundled
            model's own.
    """
    settings: dict[str, Any] = {
        "num_steps": 2_500,
        "learning_rate": 1e-3,
        "warmup_steps": 200,
        "ema_decay": 0.999,
        "checkpoint_every": 500,
    }
    config = TrainConfig(**(settings | options))
    model = seeded_unet(
        config.seed,
        in_channels=1,
        image_size=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_resolutions=(4,),
        dropout=0.1,
        num_classes=10,
    )
    return Recipe(model, GaussianDiffusion(), digits("train"), config)


def folder_recipe(
    path: str | os.PathLike[str],
    *,
    image_size: int = 32,
    flip: bool = True,
    class_labels: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """The paper's CIFAR-10 recipe for your own pictures, fewer levels if they are small.

    Args:
        path: a folder of image files, an npz file or a folder that ``datasets`` saved, see
            :func:`ddpm_fast.data.open_dataset`, also for the next five.
        image_size: height and width to train at.
        flip: mirror half of the pictures.
        class_labels: take the subfolders as classes.
        image_column: the array or column of pictures.
        label_column: the array or column of labels.
        model_options: options of :class:`UNet` to change.
        options: fields of :class:`TrainConfig` to change.

    Raises:
        FileNotFoundError, ModuleNotFoundError, NotADirectoryError, ValueError: see
            :func:`ddpm_fast.data.open_dataset` and :class:`UNet`.
    """
    config = TrainConfig(**options)
    network: dict[str, Any] = {"in_channels": 3, "dropout": 0.1} | dict(model_options or {})
    dataset = open_dataset(
        path,
        image_size,
        channels=network["in_channels"],
        flip=flip,
        class_labels=class_labels,
        image_column=image_column,
        label_column=label_column,
    )
    levels = min(4, max(1, image_size.bit_length() - 2))  # the smallest at least 4 pixels wide
    sizes = [image_size >> level for level in range(levels)]
    defaults = {
        "image_size": image_size,
        "channel_mult": (1, 2, 2, 2)[:levels],
        "attention_resolutions": [size for size in sizes if 8 < size <= 16],
        "num_classes": dataset.num_classes,
    }
    model = seeded_unet(config.seed, **(defaults | network))
    return Recipe(model, GaussianDiffusion(), dataset, config)


def seeded_unet(seed: int, **options: Any) -> UNet:
    """A new :class:`UNet` whose weights follow from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "weights"))
        return UNet(**options)


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
) -> Path:
    """Train ``model`` in place and write checkpoints to ``out``.

    A checkpoint is written every ``config.checkpoint_every`` steps and at the end, whole or not at
    all. Ctrl-C finishes the step under way, writes one more and raises KeyboardInterrupt.

    Args:
        model: a :class:`UNet` or :class:`LightweightUNet`; left in training mode, with its trained
            (not averaged) weights. ``ddpm_fast.load(out)`` has the averaged ones.
        diffusion: what it learns to reverse.
        dataset: its pictures.
        config: the options.
        out: the checkpoint file.
        resume: continue from ``out``, up to ``config.num_steps``.
        device: where to train; by default where the model is.
        progress: show loss and throughput while stderr is a terminal.

    Returns:
        The path of the checkpoint.

    Raises:
        FileExistsError: ``out`` exists and ``resume`` is False.
        FileNotFoundError: there is nothing to resume, or the folder of ``out`` is missing.
        ValueError: an unfit model, data set or checkpoint.
        FloatingPointError: loss or gradient became NaN or infinite; ``out`` keeps its last
            checkpoint from before.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    out = Path(out)
    run = _Run(model, diffusion, dataset, config, device)
    if resume:
        run.restore(out)
    elif out.exists():
        raise FileExistsError(f"{out}: exists already; resume it, or choose another path")
    elif not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder does not exist")

    bar = tqdm(
        total=config.num_steps,
        initial=run.step,
        desc="training",
        unit="step",
        disable=None if progress else True,
    )
    with bar, _Interruption() as interruption:
        while run.step < config.num_steps:
            run.advance()
            bar.update()
            saves = run.step % config.checkpoint_every == 0 or run.step == config.num_steps
            if saves or interruption.requested or run.step % _CHECK_EVERY == 0:
                loss = run.checked_loss()
                rate = (bar.format_dict["rate"] or 0) * config.batch_size
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.0f}")
            if saves or interruption.requested:
                run.save(out)
            if interruption.requested:
                raise KeyboardInterrupt(
                    f"training stopped at step {run.step} of {config.num_steps}; resume {out}"
                )
    return out


class _Run:
    """The state of a training run, and one step of it."""

    def __init__(
        self,
        model: checkpoint.Network,
        diffusion: GaussianDiffusion,
        dataset: Dataset,
        config: TrainConfig,
        device: str | torch.device | None,
    ) -> None:
        checkpoint.architecture_of(model)
        self.num_classes: int | None = getattr(model, "num_classes", None)
        if self.num_classes is not None and self.num_classes != dataset.num_classes:
            found = dataset.num_classes or "none"
            raise ValueError(f"the model has {self.num_classes} classes, the data set {found}")
        has_null_label = self.num_classes is None or getattr(model, "null_label", True)
        if config.label_dropout > 0 and not has_null_label:
            raise ValueError(
                "label_dropout must be 0 for a model without a null label;"
                f" got {config.label_dropout:g}"
            )
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        self.model = model.to(self.device).train()
        self.diffusion = diffusion
        self.dataset = dataset
        self.config = config
        self.step = 0
        self.ema = {name: tensor.clone() for name, tensor in self._weights()}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self._unchecked: list[Tensor] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def advance(self) -> None:
        """One optimizer step."""
        step, config = self.step, self.config
        generator = torch.Generator().manual_seed(_seed(config.seed, "batch", step))
        position = step * config.batch_size + torch.arange(config.batch_size)
        images, labels = self.dataset.batch(self._indices(position), generator)
        t = torch.randint(self.diffusion.num_timesteps, position.shape, generator=generator)
        model_kwargs = {}
        if self.num_classes is not None:
            assert labels is not None
            dropped = torch.rand(position.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, self.num_classes)
            model_kwargs["class_labels"] = labels.to(self.device)

        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(_seed(config.seed, "dropout", step))
            losses = self.diffusion.training_losses(
                self.model,
                images.to(self.device),
                t.to(self.device),
                model_kwargs=model_kwargs,
                seed=config.seed,
                sample_index=position.to(self.device),
            )
            loss = losses.mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
        self.optimizer.step()
        self._average(ema_decay(step, config.ema_decay))
        self._unchecked.append(torch.stack([loss.detach(), norm]))
        self.step += 1

    def checked_loss(self) -> float:
        """The mean loss since the last call. Raises FloatingPointError if the run has diverged."""
        recent = torch.stack(self._unchecked).cpu()
        finite = recent.isfinite().all(dim=1)
        if not finite.all():
            first = self.step - len(recent) + int(finite.int().argmin())
            loss, norm = recent[int(finite.int().argmin())].tolist()
            raise FloatingPointError(
                f"training diverged in step {first}: loss {loss:g}, gradient norm {norm:g};"
                " the last checkpoint was kept"
            )
        self._unchecked.clear()
        return recent[:, 0].mean().item()

    def save(self, out: Path) -> None:
        checkpoint.save(
            out,
            self.model,
            self.diffusion,
            ema=self.ema,
            optimizer=self._optimizer_tensors(),
            training=self._description(),
            step=self.step,
        )

    def restore(self, path: Path) -> None:
        """Take over the state in a checkpoint, which must be of a run like this one."""
        saved = checkpoint.read(path)
        self._check_same_run(saved, path)
        weights = dict(self._weights())
        moments = {
            f"{name}.{key}": parameter
            for name, parameter in self.model.named_parameters()
            for key in ("exp_avg", "exp_avg_sq")
        }
        steps = {f"{name}.step": torch.empty(()) for name, _ in self.model.named_parameters()}
        for found, wanted in (
            (saved.model, weights),
            (saved.ema, weights),
            (saved.optimizer, moments | steps),
        ):
            checkpoint.check_tensors(found, wanted, saved.architecture, path)
        self.model.load_state_dict(saved.model)
        self.ema = {name: saved.ema[name].to(self.device) for name in weights}
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                "step": saved.optimizer[f"{name}.step"],  # Adam keeps it on the CPU
                "exp_avg": saved.optimizer[f"{name}.exp_avg"].to(self.device),
                "exp_avg_sq": saved.optimizer[f"{name}.exp_avg_sq"].to(self.device),
            }
        self.step = saved.step

    def _indices(self, position: Tensor) -> Tensor:
        """Which pictures stand at these positions of the endless sequence of shuffled epochs."""
        size = len(self.dataset)
        indices = torch.empty_like(position)
        for epoch in sorted(set((position // size).tolist())):
            if self._order[0] != epoch:
                generator = torch.Generator().manual_seed(_seed(self.config.seed, "epoch", epoch))
                self._order = epoch, torch.randperm(size, generator=generator)
            inside = position // size == epoch
            indices[inside] = self._order[1][position[inside] % size]
        return indices

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach()) for name, tensor in self.model.state_dict().items()]

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for name, tensor in self._weights():
            self.ema[name].lerp_(tensor, 1 - decay)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, parameter in self.model.named_parameters()
            for key, tensor in self.optimizer.state[parameter].items()
        }

    def _description(self) -> dict[str, Any]:
        return asdict(self.config) | {"dataset_size": len(self.dataset), "torch": torch.__version__}

    def _check_same_run(self, saved: checkpoint.Checkpoint, path: Path) -> None:
        ours, theirs = self._description(), saved.training
        kept = [field.name for field in fields(TrainConfig)] + ["dataset_size"]
        pairs = [
            (name, ours[name], theirs.get(name))
            for name in kept
            if name not in _MAY_CHANGE_ON_RESUME
        ]
        pairs += [
            ("architecture", checkpoint.architecture_of(self.model), saved.architecture),
            ("model configuration", self.model.config(), saved.model_config),
            ("diffusion configuration", self.diffusion.config(), saved.diffusion_config),
        ]
        for name, our_value, their_value in pairs:
            if our_value != their_value:
                raise ValueError(
                    f"{path}: cannot be resumed: its {name} is {their_value},"
                    f" this run's is {our_value}"
                )
        if not saved.optimizer:
            raise ValueError(f"{path}: cannot be resumed: it holds no optimizer state")

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


def ema_decay(step: int, ceiling: float) -> float:
    """The decay of the averaged weights in a step: (1 + s) / (10 + s), at most ``ceiling``.

    Early weights are soon forgotten, so short runs have a useful average too.
    """
    return min(ceiling, (1 + step) / (10 + step))


class _Interruption:
    """Makes the first Ctrl-C a request, so that no step is left half done; a second is instant."""

    def __enter__(self) -> _Interruption:
        self.requested = False
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _seed(*parts: int | str) -> int:
    """A 64-bit seed that is a fixed function of ``parts``, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
