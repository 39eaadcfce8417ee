"""The state of a training run, and one step of it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..data import Dataset
from ..diffusion import GaussianDiffusion
from ..processes import Processes
from .averaging import AveragedWeights
from .batches import Batches, Part
from .config import TrainConfig
from .learning_rate import learning_rate
from .parallel import averaging, mean, parallel
from .seeds import seed_default_generators

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class Recent(NamedTuple):
    """Means over the steps since the last look at them, and over all processes."""

    loss: float
    gradient_norm: float


class Run:
    """The state of a training run, and one step of it.

    Attributes:
        model, diffusion, config, device, group: as given.
        ema: the averaged weights.
        step: how many are done.
        image_shape: (C, H, W) of the pictures, once a step is done.
    """

    def __init__(
        self,
        model: checkpoint.Network,
        diffusion: GaussianDiffusion,
        dataset: Dataset,
        config: TrainConfig,
        device: torch.device,
        group: Processes,
    ) -> None:
        checkpoint.architecture_of(model)
        self.num_classes = _checked_classes(model, dataset, config)
        self.model = model
        self.diffusion = diffusion
        self.config = config
        self.device = device
        self.group = group
        self.step = 0
        self.image_shape: tuple[int, ...] = ()
        self._has_file = False
        self._dataset_size = len(dataset)
        self._dataset_description = _as_saved(_description_of(dataset))
        _as_saved(self._description())
        self._batches = Batches(
            dataset, config, diffusion.num_timesteps, self.num_classes, device, group
        )
        self._parallel = parallel(model.to(device).train(), group)
        self.ema = AveragedWeights(model, config)
        self._optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        self._unchecked: list[tuple[Tensor, Tensor]] = []

    def advance(self) -> None:
        """One optimizer step. It seeds torch's global generators, which dropout draws from."""
        self._optimizer.zero_grad()
        losses = [self._backward(part) for part in self._batches.parts(self.step)]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self._optimizer.step()
        self.ema.update(self.step)
        self._unchecked.append((sum(losses[1:], start=losses[0]), norm))
        self.step += 1

    def recent(self) -> Recent:
        """What the steps since the last call were like.

        Raises:
            FloatingPointError: the run has diverged.
        """
        losses, norms = (torch.stack(column) for column in zip(*self._unchecked, strict=True))
        recent = mean(torch.stack([losses, norms], dim=1), self.group).cpu()
        finite = recent.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.int().argmin())
            loss, norm = recent[first].tolist()
            raise FloatingPointError(
                f"training diverged in step {self.step - len(recent) + first}: loss {loss:g},"
                f" gradient norm {norm:g}; "
                + ("the last checkpoint was kept" if self._has_file else "nothing was written")
            )
        self._unchecked.clear()
        return Recent(*recent.mean(dim=0).tolist())

    def save(self, out: Path) -> None:
        """Write a checkpoint, in the process that leads."""
        self._has_file = True
        if self.group.leads:
            checkpoint.save(
                out,
                self.model,
                self.diffusion,
                ema=self.ema.tensors,
                optimizer=self._optimizer_tensors(),
                training=self._description(),
                step=self.step,
            )

    def restore(self, path: Path) -> None:
        """Take over the state in a checkpoint, which must be of a run like this one."""
        saved = checkpoint.read(path)
        self._check_same_run(saved, path)
        names = [name for name, _ in self.model.named_parameters()]
        moments = {
            f"{name}.{key}": parameter
            for name, parameter in self.model.named_parameters()
            for key in _ADAM_STATE[1:]
        }
        steps = {f"{name}.step": torch.empty(()) for name in names}
        for found, wanted in (
            (saved.model, self.ema.tensors),
            (saved.ema, self.ema.tensors),
            (saved.optimizer, moments | steps),
        ):
            checkpoint.check_tensors(found, wanted, saved.architecture, path)
        self.model.load_state_dict(saved.model)
        self.ema.restore(saved.ema)
        state = {
            index: {key: saved.optimizer[f"{name}.{key}"] for key in _ADAM_STATE}
            for index, name in enumerate(names)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = saved.step
        self._has_file = True

    def _backward(self, part: Part) -> Tensor:
        """Add a part's gradient, and give its share in the loss of the batch."""
        self.image_shape = tuple(part.images.shape[1:])
        seed_default_generators(part.dropout_seed, self.device)
        with averaging(self._parallel, part.is_last):
            losses = self.diffusion.training_losses(
                self._predict,
                part.images,
                part.t,
                model_kwargs={} if part.labels is None else {"class_labels": part.labels},
                seed=self.config.seed,
                sample_index=part.position,
                loss=self.config.loss,
                min_snr_gamma=self.config.min_snr_gamma,
                offset_noise=self.config.offset_noise,
            )
            # The processes' gradients are averaged: together, a mean over the whole batch.
            loss = losses.sum() / (self.config.batch_size / self.group.count)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _predict(self, x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            output: Tensor = self._parallel(x_t, t, **kwargs)
        return output

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, parameter in self.model.named_parameters()
            for key, tensor in self._optimizer.state[parameter].items()
        }

    def _description(self) -> dict[str, Any]:
        described = self._dataset_description
        return (
            self.config.description()
            | {"dataset_size": self._dataset_size, "torch": torch.__version__}
            | ({"dataset": described} if described else {})
        )

    def _check_same_run(self, saved: checkpoint.Checkpoint, path: Path) -> None:
        theirs = TrainConfig.from_description(saved.training)
        pairs = [
            (field.name, getattr(self.config, field.name), getattr(theirs, field.name))
            for field in fields(TrainConfig)
            if not self.config.may_change_on_resume(field.name)
        ]
        pairs += [
            ("dataset_size", self._dataset_size, saved.training.get("dataset_size")),
            ("architecture", checkpoint.architecture_of(self.model), saved.architecture),
            ("model configuration", self.model.config(), saved.model_config),
            ("diffusion configuration", self.diffusion.config(), saved.diffusion_config),
        ]
        told = saved.training.get("dataset", {})  # nothing in older checkpoints
        pairs += [
            (f"dataset's {name}", value, told[name])
            for name, value in self._dataset_description.items()
            if name in told
        ]
        for name, our_value, their_value in pairs:
            if our_value != their_value:
                raise ValueError(
                    f"{path}: cannot be resumed: its {name} is {their_value},"
                    f" this run's is {our_value}"
                )
        if saved.step > self.config.num_steps:
            raise ValueError(
                f"{path}: has had {saved.step} steps, more than this run's {self.config.num_steps}"
            )
        if not saved.optimizer:
            raise ValueError(f"{path}: cannot be resumed: it holds no optimizer state")


def _description_of(dataset: Dataset) -> dict[str, Any]:
    """What the data set tells of itself, if it does."""
    describe = getattr(dataset, "description", dict)
    described: dict[str, Any] = describe()
    return described


def _as_saved(description: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of it, so that it compares with what a checkpoint tells."""
    try:
        saved: dict[str, Any] = json.loads(json.dumps(description))
    except TypeError as error:
        raise ValueError(f"a checkpoint cannot tell of this run: {error}") from None
    return saved


def _checked_classes(
    model: checkpoint.Network, dataset: Dataset, config: TrainConfig
) -> int | None:
    """The number of the model's classes, which are also the data set's; None where it has none."""
    num_classes: int | None = getattr(model, "num_classes", None)
    if num_classes is not None and num_classes != dataset.num_classes:
        found = dataset.num_classes or "none"
        raise ValueError(f"the model has {num_classes} classes, the data set {found}")
    has_null_label = num_classes is None or getattr(model, "null_label", True)
    if config.label_dropout > 0 and not has_null_label:
        raise ValueError(
            "label_dropout must be 0 for a model without a null label;"
            f" got {config.label_dropout:g}"
        )
    return num_classes
