"""The sampling loop: the network, one kernel, and nothing else in each step."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import graphs, ops
from .checks import is_walkable
from .conditioning import Labels, checked_labels, null_label
from .diffusion import GaussianDiffusion
from .evaluating import evaluating
from .solvers import Spacing, StepTable, step_table

Model = Callable[..., Tensor]
Callback = Callable[[int, int, Tensor, Tensor], object]


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The counter of the noise holds 48 bits of sample index.
_MAX_SAMPLES = 1 << 48

# A kernel must not write the step index that it reads, so two take turns.
_TURNS = 2
# Eager steps before a capture, in which libraries choose their algorithms; a multiple of _TURNS.
_WARM_UP = 4


def sample(
    model: Model,
    shape: Sequence[int],
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex | None = None,
    first_index: SupportsIndex = 0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    class_labels: Labels | None = None,
    guidance_scale: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    compile: bool = False,
    backend: str = "auto",
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Draw samples from noise: Ho et al. 2020, algorithm 2, or another sampler.

    The noise of sample i is a function of (seed, i, timestep, element) alone: whatever the batch
    it is drawn in, the device or the interruptions, it is the same picture, up to the network's
    own rounding. To draw many batches of one shape, keep a :class:`Sampler`.

    Args:
        model: called as ``model(x_t, t, **model_kwargs)`` with x_t ``[N, C, ...]`` and t int64
            ``[N]``; returns ``[N, C or 2C, ...]``. A module is put into eval mode meanwhile.
            It must not write into x_t and t, which each step overwrites. Where its convolutions
            are laid out as channels_last, so is x_t.
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
            state stays float32. A model that is itself of half precision is fed in its own.
        compile: run the network through ``torch.compile``.
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
    run = Sampler(
        model,
        shape,
        diffusion=diffusion,
        sampler=sampler,
        num_steps=num_steps,
        eta=eta,
        timestep_spacing=timestep_spacing,
        guidance_scale=guidance_scale,
        device=device,
        precision=precision,
        compile=compile,
        backend=backend,
    )
    return run(
        seed=seed,
        first_index=first_index,
        generator=generator,
        x_T=x_T,
        class_labels=class_labels,
        model_kwargs=model_kwargs,
        progress=progress,
        callback=callback,
    )


def sample_progressive(
    model: Model,
    shape: Sequence[int],
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex | None = None,
    first_index: SupportsIndex = 0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    class_labels: Labels | None = None,
    guidance_scale: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    compile: bool = False,
    backend: str = "auto",
    progress: bool = False,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """:func:`sample` step by step: yields (step, x_t, pred_xstart) after each step.

    ``x_t`` is the state that the step led to, so that the last one is the samples, and
    ``pred_xstart`` the clamped prediction it came by; both ``shape``, and the caller's to keep.
    Arguments and errors are those of :func:`sample`; errors come at the call, not at the first
    step.
    """
    run = Sampler(
        model,
        shape,
        diffusion=diffusion,
        sampler=sampler,
        num_steps=num_steps,
        eta=eta,
        timestep_spacing=timestep_spacing,
        guidance_scale=guidance_scale,
        device=device,
        precision=precision,
        compile=compile,
        backend=backend,
    )
    return run.progressive(
        seed=seed,
        first_index=first_index,
        generator=generator,
        x_T=x_T,
        class_labels=class_labels,
        model_kwargs=model_kwargs,
        progress=progress,
    )


class Sampler:
    """Draws batches of one shape, again and again: :func:`sample` with all that can be kept, kept.

    That is the step table, the buffers and, on CUDA, the graph of the network and the kernel: two
    steps, captured in the first call and replayed from then on. A callback, ``progressive`` and a
    ``generator`` need the host between the steps, which then run one by one. So they do where the
    network cannot be captured, after a warning that says why.

    Arguments are those of :func:`sample`, split between here and the call. One sampler draws one
    batch at a time.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        diffusion: GaussianDiffusion | None = None,
        sampler: str = "ddpm",
        num_steps: int | None = None,
        eta: float = 0.0,
        timestep_spacing: Spacing = "trailing",
        guidance_scale: float | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        compile: bool = False,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.shape = tuple(operator.index(size) for size in shape)
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be (N, C, ...), each at least 1; got {self.shape}")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite; got {guidance_scale}")
        self.diffusion = diffusion or GaussianDiffusion()
        self.table: StepTable = step_table(
            self.diffusion, sampler, num_steps, eta=eta, timestep_spacing=timestep_spacing
        )
        weight = _first_weight(model)
        self.device = torch.device(device or (weight.device if weight is not None else "cpu"))
        ops.serves_natively(self.device, backend)
        self.backend = backend
        self.precision = precision
        self.guided = guidance_scale is not None
        self.network = torch.compile(model) if compile else model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._uncapturable = False
        self._captured: list[int] = []
        self.kwargs: dict[str, Any] = {}
        self._prepare_buffers(weight.dtype if weight is not None else torch.float32)
        self.guidance_scale: Tensor | None = None
        if guidance_scale is not None:
            self.guidance_scale = self.rows.new_full((1, 1), guidance_scale)
        self._options = [self._step_options(turn) for turn in range(_TURNS)]
        self._advance = [
            ops.bound_reverse_step(self.x, self.rows, index, **options)
            for index, options in zip(self.step_index, self._options, strict=True)
        ]

    def __call__(
        self,
        *,
        seed: SupportsIndex | None = None,
        first_index: SupportsIndex = 0,
        generator: torch.Generator | None = None,
        x_T: Tensor | None = None,
        class_labels: Labels | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """One batch; arguments, result and errors are those of :func:`sample`."""
        self._start(seed, first_index, generator, x_T, class_labels, model_kwargs)
        with evaluating(self.model), tqdm(total=len(self.table), disable=not progress) as bar:
            if callback is None:
                self._run(generator, bar)
            else:
                for step, pred_xstart in self._steps(generator, bar):
                    callback(step, self.table.timesteps[step], self.x, pred_xstart)
        return self.x.clone()

    def progressive(
        self,
        *,
        seed: SupportsIndex | None = None,
        first_index: SupportsIndex = 0,
        generator: torch.Generator | None = None,
        x_T: Tensor | None = None,
        class_labels: Labels | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """One batch, step by step, as :func:`sample_progressive` yields it."""
        self._start(seed, first_index, generator, x_T, class_labels, model_kwargs)

        def steps() -> Iterator[tuple[int, Tensor, Tensor]]:
            with evaluating(self.model), tqdm(total=len(self.table), disable=not progress) as bar:
                for step, pred_xstart in self._steps(generator, bar):
                    yield step, self.x.clone(), pred_xstart.clone()

        return steps()

    def _prepare_buffers(self, model_dtype: torch.dtype) -> None:
        dtype = ops.compute_dtype(model_dtype)
        layout = _memory_format(self.model, len(self.shape))
        batch, *sizes = self.shape
        asked = batch * (2 if self.guided else 1)
        self.rows = self.table.to(self.device, dtype)
        self.x = torch.empty(self.shape, dtype=dtype, device=self.device, memory_format=layout)
        # What the network reads: x itself, unless it wants another type, or each sample twice.
        self.next_input: Tensor | None = None
        if self.guided or model_dtype != dtype:
            self.next_input = torch.empty(
                (asked, *sizes), dtype=model_dtype, device=self.device, memory_format=layout
            )
        self.model_input = self.x if self.next_input is None else self.next_input
        first = self.model_input.data_ptr()
        self._input_memory = range(first, first + self.model_input.nbytes)
        self.t = torch.empty(asked, dtype=torch.int64, device=self.device)
        self.step_index = torch.zeros(_TURNS, dtype=torch.int64, device=self.device).unbind()
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.offset = torch.arange(batch, device=self.device)
        self.sample_index = torch.empty_like(self.offset)

    def _start(
        self,
        seed: SupportsIndex | None,
        first_index: SupportsIndex,
        generator: torch.Generator | None,
        x_T: Tensor | None,
        class_labels: Labels | None,
        model_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Checks the arguments of a call, and puts all buffers where its first step finds them."""
        kwargs = self._checked_kwargs(class_labels, model_kwargs)
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        batch, first = self.shape[0], operator.index(first_index)
        if not 0 <= first <= _MAX_SAMPLES - batch:
            raise ValueError(f"first_index must lie in [0, 2**48 - {batch}]; got {first}")
        if x_T is not None and tuple(x_T.shape) != self.shape:
            raise ValueError(f"x_T must have shape {list(self.shape)}; got {list(x_T.shape)}")
        if x_T is not None and not x_T.is_floating_point():
            raise ValueError(f"x_T must hold floating-point numbers; got {x_T.dtype}")
        if generator is None:
            self.seed.copy_(ops.seed_tensor(seed, self.device))
            torch.add(self.offset, first, out=self.sample_index)

        self._hand_over(kwargs)
        self.x.copy_(self._initial_noise(generator) if x_T is None else x_T.detach())
        if self.next_input is not None:
            self.next_input.view(-1, *self.shape).copy_(self.x)
        self.step_index[0].zero_()
        self.t.fill_(self.table.timesteps[0])

    def _checked_kwargs(
        self, class_labels: Labels | None, model_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        kwargs = dict(model_kwargs or {})
        if class_labels is None:
            if self.guided:
                raise ValueError("guidance_scale needs class_labels to guide towards")
            return kwargs
        if "class_labels" in kwargs:
            raise ValueError("give class_labels by itself or in model_kwargs, not both")
        labels = checked_labels(class_labels, self.shape[0], self.model).to(self.device)
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, null_label(self.model))])
        return kwargs | {"class_labels": labels}

    def _hand_over(self, kwargs: dict[str, Any]) -> None:
        """Keeps the graph where it can serve this call too; the tensors it reads get new values."""
        if self._graph is not None:
            moved = self._captured != _addresses(self.model)
            if not moved and _replaceable(self.kwargs, kwargs):
                for name, value in kwargs.items():
                    if isinstance(value, Tensor):
                        self.kwargs[name].copy_(value)
                return
            self._graph = None
        self.kwargs = kwargs

    def _initial_noise(self, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            return self._randn(generator)
        return ops.philox_normal(
            self.shape,
            seed=self.seed,
            sample_index=self.sample_index,
            timestep=torch.zeros_like(self.seed),
            stream=ops.STREAMS["initial"],
            dtype=self.x.dtype,
            backend=self.backend,
        )

    def _randn(self, generator: torch.Generator) -> Tensor:
        where = generator.device
        noise = torch.randn(self.shape, generator=generator, device=where, dtype=self.x.dtype)
        return noise.to(self.device)

    def _run(self, generator: torch.Generator | None, bar: tqdm[NoReturn]) -> None:
        """All steps, with nothing between them."""
        with torch.inference_mode(), self._autocast():
            done = self._replay(bar) if generator is None and self._captures() else 0
            for step in range(done, len(self.table)):
                self._step(step, generator)
                bar.update()

    def _steps(
        self, generator: torch.Generator | None, bar: tqdm[NoReturn]
    ) -> Iterator[tuple[int, Tensor]]:
        """The steps one by one: the number of each, and its prediction of x_start."""
        pred_xstart = torch.empty_like(self.x)
        for step in range(len(self.table)):
            # Entered anew at every step: whoever is called between them must not find them set.
            with torch.inference_mode(), self._autocast():
                self._step(step, generator, pred_xstart)
            bar.update()
            yield step, pred_xstart

    def _captures(self) -> bool:
        return self.device.type == "cuda" and not self._uncapturable

    def _replay(self, bar: tqdm[NoReturn]) -> int:
        """As many steps as the graph can do, captured first if need be; returns their number."""
        done, total = 0, len(self.table)
        if self._graph is None and total < _WARM_UP + _TURNS:
            return 0
        with torch.cuda.device(self.device):
            if self._graph is None:
                with graphs.beside_the_current_stream(self.device):
                    done = self._turns(_WARM_UP)
                bar.update(done)
                self._capture()
            while self._graph is not None and done + _TURNS <= total:
                self._graph.replay()
                done += _TURNS
                bar.update(_TURNS)
        return done

    def _turns(self, count: int) -> int:
        for step in range(count):
            self._step(step)
        return count

    def _capture(self) -> None:
        kwargs = self.kwargs
        # The graph reads from here; the caller's tensors remain the caller's.
        with torch.inference_mode(False):
            self.kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        self._captured = _addresses(self.model)
        self._graph = graphs.capture(lambda: self._turns(_TURNS))
        self._uncapturable = self._graph is None

    def _step(
        self,
        step: int,
        generator: torch.Generator | None = None,
        pred_xstart: Tensor | None = None,
    ) -> None:
        """One step: x, and what the network and the kernel are to be called with next."""
        turn = step % _TURNS
        if generator is None and pred_xstart is None:
            self._advance[turn](self._predict())
            return
        options = self._options[turn] | {"out": self.x, "pred_xstart": pred_xstart}
        if generator is not None:
            options |= self._given_noise(step, generator)
        ops.reverse_step(self.x, self._predict(), self.rows, self.step_index[turn], **options)

    def _step_options(self, turn: int) -> dict[str, Any]:
        """What reverse_step is called with at every other step."""
        draws = self.table.draws_noise
        return {
            "seed": self.seed if draws else None,
            "sample_index": self.sample_index if draws else None,
            "guidance_scale": self.guidance_scale,
            "clip": self.table.clip,
            "next_input": self.next_input,
            "next_step": self.step_index[turn - 1],
            "next_t": self.t,
            "backend": self.backend,
        }

    def _given_noise(self, step: int, generator: torch.Generator) -> dict[str, Tensor | None]:
        # The last step has none to draw.
        draws = self.table.draws_noise and step + 1 < len(self.table)
        noise = self._randn(generator) if draws else None
        return {"noise": noise, "seed": None, "sample_index": None}

    def _predict(self) -> Tensor:
        output = self.network(self.model_input, self.t, **self.kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must return a tensor; got {type(output).__name__}")
        if self.table.reads_variance and output.shape[1] != 2 * self.shape[1]:
            raise ValueError(
                f"a {self.diffusion.variance_type} variance needs a model with "
                f"{2 * self.shape[1]} output channels; got {output.shape[1]}"
            )
        if output.data_ptr() in self._input_memory:
            output = output.clone()  # it is about to be overwritten
        return output if output.is_contiguous() or is_walkable(output) else output.contiguous()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        if self.precision == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        # A graph must not read weights that were cast for this context, and end with it.
        keep_cast_weights = self.device.type != "cuda"
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=keep_cast_weights)


def _first_weight(model: Model) -> Tensor | None:
    if not isinstance(model, nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _memory_format(model: Model, dims: int) -> torch.memory_format:
    """channels_last where the model's convolutions are laid out so."""
    weights = model.parameters() if isinstance(model, nn.Module) and dims == 4 else ()
    for weight in weights:
        if weight.dim() == 4 and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def _addresses(model: Model) -> list[int]:
    """Where a model's numbers lie, which a graph has by heart."""
    if not isinstance(model, nn.Module):
        return []
    return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]


def _replaceable(captured: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether a graph of the first serves the second, once the tensors have new values."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return isinstance(a, bool | int | float | str | NoneType) and type(a) is type(b) and a == b

    return captured.keys() == kwargs.keys() and all(alike(captured[k], kwargs[k]) for k in kwargs)
