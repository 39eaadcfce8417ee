"""The sampling loop: the network, one kernel, and nothing else in each step."""

from __future__ import annotations

import contextlib
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops
from .checks import is_walkable
from .diffusion import GaussianDiffusion
from .solvers import Spacing, StepTable, step_table

Model = Callable[..., Tensor]
Callback = Callable[[int, int, Tensor, Tensor], object]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The counter of the noise holds 48 bits of sample index.
_MAX_SAMPLES = 1 << 48


def sample(
    model: Model,
    shape: Sequence[int],
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: int | None = None,
    first_index: int = 0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    guidance_scale: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    backend: str = "auto",
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Draw samples from noise: Ho et al. 2020, algorithm 2, or another sampler.

    The noise of sample i is a function of (seed, i, timestep, element) alone: whatever the batch
    it is drawn in, the device or the interruptions, it is the same picture, up to the network's
    own rounding.

    Args:
        model: called as ``model(x_t, t, **model_kwargs)`` with x_t ``[N, C, ...]`` and t int64
            ``[N]``; returns ``[N, C or 2C, ...]``. A module is put into eval mode meanwhile.
            It must not write into x_t and t, which each step overwrites.
        shape: ``(N, C, ...)`` of the samples.
        diffusion: the process the model was trained for; by default linear betas 1e-4 ... 0.02,
            T = 1000, epsilon prediction.
        sampler: ``ddpm`` or ``ddim``.
        num_steps: how many of the T timesteps to visit; all by default.
        eta: DDIM's, in [0, 1]; 0 adds no noise.
        timestep_spacing: ``leading``, ``linspace``, ``trailing`` or the timesteps themselves; see
            :func:`ddpm_fast.schedules.respace`.
        seed: in [0, 2**64); drawn from torch's global generator by default.
        first_index: the index of the first sample of this batch in the whole run.
        generator: draw the noise with ``torch.randn`` from it instead, on its device.
        x_T: where to start, like the samples; noise by default.
        class_labels: int64 ``[N]``, or one for all: passed on as ``class_labels``.
        guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans
            2022), between the labels and the model's null label ``model.num_classes``.
        model_kwargs: passed on to the model; with guidance, for a batch of the conditional and,
            behind them, the unconditional samples.
        device: where to compute; the model's by default.
        precision: ``bf16`` or ``fp16`` runs the network under autocast, ``fp32`` without; the
            state stays float32.
        backend: ``auto``, ``native`` or ``reference``; see :mod:`ddpm_fast.ops`.
        progress: show a progress bar.
        callback: called as ``callback(step, t, x, pred_xstart)`` after each step, x being the
            state that the step led to; it may read the tensors, which the next step overwrites.

    Returns:
        ``shape``, float32 (float64 for a float64 model), in [-1, 1] where the diffusion clamps.

    Raises:
        ValueError: an argument out of range, of another shape or unknown, before any work.
        TypeError: an argument of another type, likewise.
        RuntimeError: backend ``native`` cannot serve the device.
    """
    run = _Run(model, shape, diffusion or GaussianDiffusion(), device, backend)
    run.prepare_table(sampler, num_steps, eta, timestep_spacing)
    run.prepare_model(class_labels, guidance_scale, model_kwargs, precision)
    run.prepare_noise(seed, first_index, generator, x_T)
    if callback is not None:
        run.keep_pred_xstart()
    for step in run.steps(progress):
        if callback is not None and run.pred_xstart is not None:
            callback(step, run.table.timesteps[step], run.x, run.pred_xstart)
    return run.x


def sample_progressive(
    model: Model,
    shape: Sequence[int],
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: int | None = None,
    first_index: int = 0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    guidance_scale: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """:func:`sample` step by step: yields (step, x_t, pred_xstart) after each step.

    ``x_t`` is the state that the step led to, so that the last one is the samples, and
    ``pred_xstart`` the clamped prediction it came by; both ``shape``, and the caller's to keep.
    Arguments and errors are those of :func:`sample`; errors come at the call, not at the first
    step.
    """
    run = _Run(model, shape, diffusion or GaussianDiffusion(), device, backend)
    run.prepare_table(sampler, num_steps, eta, timestep_spacing)
    run.prepare_model(class_labels, guidance_scale, model_kwargs, precision)
    run.prepare_noise(seed, first_index, generator, x_T)
    pred_xstart = run.keep_pred_xstart()
    return ((step, run.x.clone(), pred_xstart.clone()) for step in run.steps(progress))


class _Run:
    """One call of :func:`sample`: its arguments, checked, and the buffers of its loop."""

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        diffusion: GaussianDiffusion,
        device: torch.device | str | None,
        backend: str,
    ) -> None:
        self.model = model
        self.shape = tuple(operator.index(size) for size in shape)
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be (N, C, ...), each at least 1; got {self.shape}")
        self.diffusion = diffusion
        weight = _first_weight(model)
        self.device = torch.device(device or (weight.device if weight is not None else "cpu"))
        self.model_dtype = weight.dtype if weight is not None else torch.float32
        self.dtype = ops.compute_dtype(self.model_dtype)
        self.backend = backend
        ops.serves_natively(self.device, backend)
        self.pred_xstart: Tensor | None = None

    def prepare_table(
        self, sampler: str, num_steps: int | None, eta: float, spacing: Spacing
    ) -> None:
        self.table: StepTable = step_table(
            self.diffusion, sampler, num_steps, eta=eta, timestep_spacing=spacing
        )
        self.rows = self.table.to(self.device, self.dtype)
        self.timesteps = torch.tensor(self.table.timesteps, device=self.device)

    def prepare_model(
        self,
        class_labels: int | Sequence[int] | Tensor | None,
        guidance_scale: float | None,
        model_kwargs: Mapping[str, Any] | None,
        precision: str | None,
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        self.precision = precision
        self.model_kwargs = dict(model_kwargs or {})
        self.guidance_scale = guidance_scale
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite; got {guidance_scale}")
        if class_labels is not None and "class_labels" in self.model_kwargs:
            raise ValueError("give class_labels by itself or in model_kwargs, not both")
        if class_labels is not None:
            labels = _checked_labels(class_labels, self.shape[0], self.model).to(self.device)
            if guidance_scale is not None:
                null = torch.full_like(labels, _null_label(self.model))
                labels = torch.cat([labels, null])
            self.model_kwargs["class_labels"] = labels
        elif guidance_scale is not None:
            raise ValueError("guidance_scale needs class_labels to guide towards")

    def prepare_noise(
        self,
        seed: int | None,
        first_index: int,
        generator: torch.Generator | None,
        x_T: Tensor | None,
    ) -> None:
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        batch, first_index = self.shape[0], operator.index(first_index)
        if not 0 <= first_index <= _MAX_SAMPLES - batch:
            raise ValueError(f"first_index must lie in [0, 2**48 - {batch}]; got {first_index}")
        self.generator = generator
        if generator is None:
            self.seed = ops.seed_tensor(seed, self.device)
            last = first_index + batch
            self.sample_index = torch.arange(first_index, last, device=self.device)
        self.x = self._initial_noise() if x_T is None else self._checked_start(x_T)

    def _initial_noise(self) -> Tensor:
        if self.generator is not None:
            return self._randn()
        return ops.philox_normal(
            self.shape,
            seed=self.seed,
            sample_index=self.sample_index,
            timestep=torch.zeros_like(self.seed),
            stream=ops.STREAMS["initial"],
            dtype=self.dtype,
            backend=self.backend,
        )

    def _checked_start(self, x_T: Tensor) -> Tensor:
        if tuple(x_T.shape) != self.shape:
            raise ValueError(f"x_T must have shape {list(self.shape)}; got {list(x_T.shape)}")
        if not x_T.is_floating_point():
            raise ValueError(f"x_T must hold floating-point numbers; got {x_T.dtype}")
        layout = torch.contiguous_format
        return x_T.detach().to(self.device, self.dtype, copy=True, memory_format=layout)

    def _randn(self) -> Tensor:
        assert self.generator is not None
        where = self.generator.device
        noise = torch.randn(self.shape, generator=self.generator, device=where, dtype=self.dtype)
        return noise.to(self.device)

    def keep_pred_xstart(self) -> Tensor:
        self.pred_xstart = torch.empty_like(self.x)
        return self.pred_xstart

    def steps(self, progress: bool) -> Iterator[int]:
        """Runs the loop; ``x`` and ``pred_xstart`` are at each yield as the step left them."""
        copies = 1 if self.guidance_scale is None else 2
        t = torch.empty(copies * self.shape[0], dtype=torch.int64, device=self.device)
        indices = torch.arange(len(self.table), device=self.device).unbind()
        draws_noise = self.table.draws_noise
        with _evaluating(self.model), tqdm(total=len(self.table), disable=not progress) as bar:
            for step, index in enumerate(indices):
                # Re-entered at every step: a generator must not leave its mode to its caller.
                with torch.inference_mode():
                    t.copy_(self.timesteps[step])
                    output = self._model_output(t)
                    ops.reverse_step(
                        self.x,
                        output,
                        self.rows,
                        index,
                        **(self._noise(step) if draws_noise else {}),
                        clip=self.table.clip,
                        out=self.x,
                        pred_xstart=self.pred_xstart,
                        backend=self.backend,
                    )
                bar.update()
                yield step

    def _noise(self, step: int) -> dict[str, Tensor]:
        if self.generator is None:
            return {"seed": self.seed, "sample_index": self.sample_index}
        # The last step has none to draw.
        return {"noise": self._randn()} if step + 1 < len(self.table) else {}

    def _model_output(self, t: Tensor) -> Tensor:
        x = self.x.to(self.model_dtype)
        if self.guidance_scale is not None:
            x = torch.cat([x, x])
        with self._autocast():
            output = self.model(x, t, **self.model_kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must return a tensor; got {type(output).__name__}")
        if self.guidance_scale is not None:
            output = _guided(output, self.guidance_scale, self.shape[1])
        if self.table.reads_variance and output.shape[1] != 2 * self.shape[1]:
            raise ValueError(
                f"a {self.diffusion.variance_type} variance needs a model with "
                f"{2 * self.shape[1]} output channels; got {output.shape[1]}"
            )
        if output.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr():
            output = output.clone()  # a part of its input, which the step is to overwrite
        return output if is_walkable(output) else output.contiguous()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        if self.precision == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])


def _guided(output: Tensor, scale: float, channels: int) -> Tensor:
    cond, uncond = output.chunk(2)
    guided = torch.lerp(uncond[:, :channels], cond[:, :channels], scale)
    # A learned variance is the conditional one's.
    return torch.cat([guided, cond[:, channels:]], dim=1)


def _first_weight(model: Model) -> Tensor | None:
    if not isinstance(model, nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _null_label(model: Model) -> int:
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError("guidance_scale needs a model with num_classes, the null label")
    return int(num_classes)


def _checked_labels(labels: int | Sequence[int] | Tensor, batch: int, model: Model) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"class_labels must be integers; got {labels.dtype}")
    labels = labels.to(torch.int64)
    if labels.dim() == 0:
        labels = labels.expand(batch)
    if list(labels.shape) != [batch]:
        raise ValueError(f"class_labels must have shape [{batch}]; got {list(labels.shape)}")
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and not bool(((labels >= 0) & (labels <= num_classes)).all()):
        raise ValueError(
            f"class_labels must lie in [0, {num_classes - 1}], or be the null label {num_classes}"
        )
    return labels.contiguous()


# The models that are sampled from now: by how many runs, and the modes of their parts before.
_sampled: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]]
_sampled = WeakKeyDictionary()
_sampled_lock = threading.Lock()


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode for all of the model; the last of the runs that share it puts each part back."""
    if not isinstance(model, nn.Module):
        yield
        return
    with _sampled_lock:
        runs, modes = _sampled.get(model, (0, [(part, part.training) for part in model.modules()]))
        _sampled[model] = runs + 1, modes
        for part, _ in modes:
            part.training = False
    try:
        yield
    finally:
        with _sampled_lock:
            runs, modes = _sampled.pop(model)
            if runs > 1:
                _sampled[model] = runs - 1, modes
            else:
                for part, mode in modes:
                    part.training = mode
