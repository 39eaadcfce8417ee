"""The sampling loop: the network, one kernel, and nothing else in each step."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from torch import Tensor
from tqdm import tqdm

from . import graphs, ops
from .checks import check_is_tensor
from .conditioning import Labels, checked_labels, with_null
from .diffusion import GaussianDiffusion
from .evaluating import evaluating
from .guidance import (
    Gradient,
    Scale,
    check_guidance,
    gradient_at,
    rescale_factor,
    scale_table,
    score_coefs,
    shifted,
)
from .intermediates import Intermediates, Moments, Recorder, checked_moments
from .network import Model, Network, check_has_variance, ready
from .options import Callback, CallOptions, SampleOptions
from .solvers import Spacing, StepTable, step_table

if TYPE_CHECKING:
    from typing_extensions import Unpack

Count = Callable[[int], object]  # is told how many steps more are done

# The counter of the noise holds 48 bits of sample index.
_MAX_SAMPLES = 1 << 48

# A kernel must not write the step index that it reads, so two take turns.
_TURNS = 2
# Eager steps before a capture, in which libraries choose their algorithms; a multiple of _TURNS.
_WARM_UP = 4
# Steps in the longer graph, another multiple, of a network whose step the host queues in no more
# than so many seconds: small enough for the gaps between graphs to count, and for so many captures.
_LONG, _QUICK = 20, 1e-3


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    return_intermediates: None = None,
    **options: Unpack[SampleOptions],
) -> Tensor: ...


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    return_intermediates: Moments,
    **options: Unpack[SampleOptions],
) -> tuple[Tensor, Intermediates]: ...


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    return_intermediates: Moments | None,
    **options: Unpack[SampleOptions],
) -> Tensor | tuple[Tensor, Intermediates]: ...


def sample(
    model: Model,
    shape: Sequence[int],
    *,
    diffusion: GaussianDiffusion | None = None,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    eta: float = 0.0,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex | None = None,
    first_index: SupportsIndex = 0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    class_labels: Labels | None = None,
    guidance_scale: Scale | None = None,
    guidance_rescale: float = 0.0,
    cond_fn: Gradient | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    compile: bool = False,
    backend: str = "auto",
    progress: bool = False,
    callback: Callback | None = None,
    return_intermediates: Moments | None = None,
) -> Tensor | tuple[Tensor, Intermediates]:
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
        sampler: ``ddpm``, ``ddim`` or ``dpmpp_2m``; or a table of :mod:`ddpm_fast.solvers`, which
            settles the next three.
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
            2022), between the labels and the model's null label ``model.num_classes``: one number,
            ``[N]`` for each sample, or ``[S or 1, N or 1]`` for each step and sample.
        guidance_rescale: in [0, 1], how far the guided prediction gets the standard deviation of
            the conditional one (Lin et al. 2023, eq. 16).
        cond_fn: classifier guidance (Dhariwal & Nichol 2021): called as the model is, it returns
            the gradient of log p(y | x_t) by x_t, like x_t, which then shifts the prediction.
        known: what an inpainted picture keeps, like the samples; and
        mask: where, 1, and where not, 0; it broadcasts against the samples.
            :func:`ddpm_fast.editing.inpaint` is the way to use the two.
        model_kwargs: passed on to the model; with guidance, for a batch of the conditional and,
            behind them, the unconditional samples.
        device: where to compute; the model's by default.
        precision: ``bf16`` or ``fp16`` runs the network and ``cond_fn`` under autocast, ``fp32``
            without; the state stays float32. A model of half precision is fed in its own.
        compile: run the network through ``torch.compile``.
        backend: ``auto``, ``native`` or ``reference``; see :mod:`ddpm_fast.ops`.
        progress: show a progress bar.
        callback: called as ``callback(step, t, x, pred_xstart)`` after each step, x being the
            state that the step led to; it may read the tensors, which the next step overwrites.
            Where it returns ``True``, that step is the last, and what is returned the state that
            it led to.
        return_intermediates: how many moments of the run to keep, evenly spaced and with both
            ends; or which, counted in the steps taken: 0 is x_T, and S, the number of steps, the
            samples. A run that is stopped after step k has those up to moment k.

    Returns:
        ``shape``, float32 (float64 for a float64 model), in [-1, 1] where the diffusion clamps.
        With ``return_intermediates`` a pair, of that and the :class:`Intermediates`.

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
        guidance_rescale=guidance_rescale,
        cond_fn=cond_fn,
        known=known,
        mask=mask,
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
        return_intermediates=return_intermediates,
    )


def sample_progressive(
    model: Model, shape: Sequence[int], **options: Any
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """:func:`sample` step by step: yields (step, x_t, pred_xstart) after each step.

    ``x_t`` is the state that the step led to, so that the last one is the samples, and
    ``pred_xstart`` the clamped prediction it came by; both ``shape``, and the caller's to keep.
    Options and errors are those of :func:`sample`, which has ``callback`` besides; errors come at
    the call, not at the first step.
    """
    call = {name: options.pop(name) for name in CallOptions.__optional_keys__ if name in options}
    return Sampler(model, shape, **options).progressive(**call)


class Sampler:
    """Draws batches of one shape, again and again: :func:`sample` with all that can be kept, kept.

    That is the step table, the buffers and, on CUDA, the graph of the network and the kernel: two
    steps, of a small network also twenty, captured in the first call and replayed from then on. A
    callback, intermediates, ``progressive`` and a ``generator`` need the host between the steps,
    which then run one by one. So they do where the network cannot be captured, after a warning that
    says why.

    Arguments are those of :func:`sample`, split between here and the call. One sampler draws one
    batch at a time.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`sample`.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        diffusion: GaussianDiffusion | None = None,
        sampler: str | StepTable = "ddpm",
        num_steps: int | None = None,
        eta: float = 0.0,
        timestep_spacing: Spacing = "trailing",
        guidance_scale: Scale | None = None,
        guidance_rescale: float = 0.0,
        cond_fn: Gradient | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        compile: bool = False,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.shape = checked_shape(shape)
        check_guidance(guidance_scale, guidance_rescale, cond_fn)
        self.diffusion = diffusion or GaussianDiffusion()
        self.table = _table(self.diffusion, sampler, num_steps, eta, timestep_spacing)
        self.network = Network(model, device=device, precision=precision, compile=compile)
        self.device = self.network.device
        ops.serves_natively(self.device, backend)
        self.backend = backend
        self.guided = guidance_scale is not None
        self._graphs: dict[int, graphs.Graph] = {}  # by their steps, the most first
        self._uncapturable = False
        self._captured: list[int] = []
        self.kwargs: dict[str, Any] = {}
        with torch.inference_mode(False):  # a sampler serves in any mode
            self._prepare_buffers()
            self._prepare_conditions(guidance_scale, guidance_rescale, cond_fn)
            self.known, self.mask = self._checked_known(known, mask)
        self.draws_noise = self.table.draws_noise or known is not None
        self._options = [self._step_options(turn) for turn in range(_TURNS)]
        variance_of = self.shape[1] if self.table.reads_variance else None
        self._ready = partial(_ready, x=self.model_input, variance_of=variance_of)
        self._begin_with_noise = self._beginning(sigma=1.0, stream=ops.STREAMS["initial"])
        self._begin_where_x_is = self._beginning(mean_from_xt=1.0)
        self._advance = [
            ops.bound_reverse_step(self.x, self.rows, index, ready=self._ready, **options)
            for index, options in zip(self.step_index, self._options, strict=True)
        ]

    @overload
    def __call__(
        self, *, return_intermediates: None = None, **options: Unpack[CallOptions]
    ) -> Tensor: ...

    @overload
    def __call__(
        self, *, return_intermediates: Moments, **options: Unpack[CallOptions]
    ) -> tuple[Tensor, Intermediates]: ...

    @overload
    def __call__(
        self, *, return_intermediates: Moments | None, **options: Unpack[CallOptions]
    ) -> Tensor | tuple[Tensor, Intermediates]: ...

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
        return_intermediates: Moments | None = None,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """One batch; arguments, result and errors are those of :func:`sample`."""
        moments = checked_moments(return_intermediates, len(self.table))
        self._start(seed, first_index, generator, x_T, class_labels, model_kwargs)
        with evaluating(self.model), _progress_bar(len(self.table), progress) as count:
            if callback is None and not moments:
                self._run(generator, count)
                return self.x.clone()
            recorder = Recorder(moments, self.table.timesteps, self.x)
            self._run_watched(generator, count, callback, recorder)
        images = self.x.clone()
        return (images, recorder.intermediates()) if moments else images

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
            with evaluating(self.model), _progress_bar(len(self.table), progress) as count:
                for step, pred_xstart in self._steps(generator, count):
                    yield step, self.x.clone(), pred_xstart.clone()

        return steps()

    def _prepare_buffers(self) -> None:
        model_dtype = self.network.dtype
        dtype = ops.compute_dtype(model_dtype)
        layout = self.network.memory_format(len(self.shape))
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
        self.t = torch.empty(asked, dtype=torch.int64, device=self.device)
        self.step_index = torch.zeros(_TURNS, dtype=torch.int64, device=self.device).unbind()
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.first_index = 0
        self.sample_index = torch.arange(batch, device=self.device)

    def _prepare_conditions(
        self, scale: Scale | None, rescale: float, cond_fn: Gradient | None
    ) -> None:
        """What decides beside the network where a step leads, and the numbers the kernel reads."""
        steps, batch, table = len(self.table), self.shape[0], self.table
        self.guidance_scale = None if scale is None else scale_table(scale, steps, batch, self.rows)
        self.guidance_rescale = rescale
        self.guidance_factor = self.rows.new_ones(batch) if rescale else None
        self.threshold = None if table.thresholding is None else self.rows.new_ones(batch)
        self.history = torch.empty_like(self.x) if table.has_history else None
        self.cond_fn = cond_fn
        if cond_fn is not None:
            self.score_coefs = score_coefs(self.diffusion, table).to(self.rows)

    def _beginning(self, **coefs: float) -> Callable[[Any], object]:
        """A step before the first, from x to x by the coefficients of a row; it reads no output."""
        row = self.rows.new_tensor([[coefs.get(name, 0.0) for name in ops.ROW]])
        draws_noise = "sigma" in coefs
        return ops.bound_reverse_step(
            self.x,
            torch.cat([self.rows[:1], row]),  # from the second row to the first
            torch.ones_like(self.seed),
            ready=lambda x: x,
            seed=self.seed if draws_noise else None,
            sample_index=self.sample_index if draws_noise else None,
            clip=None,
            next_input=self.next_input,
            next_step=self.step_index[0],
            next_t=self.t,
            backend=self.backend,
        )

    def _checked_known(
        self, known: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if known is None and mask is None:
            return None, None
        if known is None or mask is None:
            raise ValueError("known and mask must be given together")
        check_is_tensor("known", known)
        check_is_tensor("mask", mask)
        if tuple(known.shape) != self.shape:
            raise ValueError(f"known must have shape {list(self.shape)}; got {list(known.shape)}")
        if not known.is_floating_point():
            raise ValueError(f"known must hold floating-point numbers; got {known.dtype}")
        try:
            mask = mask.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"mask must broadcast to shape {list(self.shape)}; got {list(mask.shape)}"
            ) from None
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("mask must lie in [0, 1]")
        return torch.empty_like(self.x).copy_(known.detach()), torch.empty_like(self.x).copy_(mask)

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
        first = checked_first_index(first_index, self.shape[0])
        if x_T is not None:
            self._check_start(x_T)
        if generator is None and (x_T is None or self.draws_noise):
            self.seed.fill_(ops.signed_seed(seed))
            if first != self.first_index:
                torch.arange(first, first + self.shape[0], out=self.sample_index)
                self.first_index = first

        self._hand_over(kwargs)
        if x_T is not None:
            self.x.copy_(x_T.detach())
        elif generator is not None:
            self.x.copy_(self._randn(generator))
        else:
            self._begin_with_noise(self.x)
            return
        self._begin_where_x_is(self.x)

    def _check_start(self, x_T: Tensor) -> None:
        check_is_tensor("x_T", x_T)
        if tuple(x_T.shape) != self.shape:
            raise ValueError(f"x_T must have shape {list(self.shape)}; got {list(x_T.shape)}")
        if not x_T.is_floating_point():
            raise ValueError(f"x_T must hold floating-point numbers; got {x_T.dtype}")

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
            labels = with_null(labels, self.model)
        return kwargs | {"class_labels": labels}

    def _hand_over(self, kwargs: dict[str, Any]) -> None:
        """Keeps the graph where it can serve this call too; the tensors it reads get new values."""
        if self._graphs:
            moved = self._captured != self.network.addresses()
            if not moved and _replaceable(self.kwargs, kwargs):
                for name, value in kwargs.items():
                    if isinstance(value, Tensor):
                        self.kwargs[name].copy_(value)
                return
            self._graphs = {}
        self.kwargs = kwargs

    def _randn(self, generator: torch.Generator) -> Tensor:
        where = generator.device
        noise = torch.randn(self.shape, generator=generator, device=where, dtype=self.x.dtype)
        return noise.to(self.device)

    def _run(self, generator: torch.Generator | None, count: Count) -> None:
        """All steps, with nothing between them."""
        with torch.inference_mode(), self.network.autocast():
            done = self._replay(count) if generator is None and self._captures() else 0
            steps = range(done, len(self.table))
            if generator is None and not self._looks_between():
                self._run_straight(steps, count)
                return
            for step in steps:
                self._step(step, generator)
                count(1)

    def _run_straight(self, steps: range, count: Count) -> None:
        """Steps of which nobody looks at the output: Python in between takes its time, too."""
        network, x, t, kwargs = self.network.call, self.model_input, self.t, self.kwargs
        for step in steps:
            self._advance[step % _TURNS](network(x, t, **kwargs))
            count(1)

    def _run_watched(
        self,
        generator: torch.Generator | None,
        count: Count,
        callback: Callback | None,
        recorder: Recorder,
    ) -> None:
        """The steps one by one, each shown, until the callback has seen enough."""
        for step, pred_xstart in self._steps(generator, count):
            recorder.step_taken(step, self.x, pred_xstart)
            if callback is None:
                continue
            if callback(step, self.table.timesteps[step], self.x, pred_xstart) is True:
                return

    def _steps(
        self, generator: torch.Generator | None, count: Count
    ) -> Iterator[tuple[int, Tensor]]:
        """The steps one by one: the number of each, and its prediction of x_start."""
        pred_xstart = torch.empty_like(self.x) if self.history is None else self.history
        for step in range(len(self.table)):
            # Entered anew at every step: whoever is called between them must not find them set.
            with torch.inference_mode(), self.network.autocast():
                self._step(step, generator, pred_xstart)
            count(1)
            yield step, pred_xstart

    def _looks_between(self) -> bool:
        """Whether a step does anything between the network and the kernel."""
        measured = self.guidance_factor is not None or self.threshold is not None
        return measured or self.cond_fn is not None

    def _captures(self) -> bool:
        # A gradient's callback may do anything.
        return self.device.type == "cuda" and self.cond_fn is None and not self._uncapturable

    def _replay(self, count: Count) -> int:
        """As many steps as the graphs can do, captured first if need be; returns their number."""
        done, total = 0, len(self.table)
        if not self._graphs and total < _WARM_UP + _TURNS:
            return 0
        with torch.cuda.device(self.device):
            if not self._graphs:
                with graphs.beside_the_current_stream(self.device):
                    seconds = self._warm_up()
                done = _WARM_UP
                count(done)
                self._capture(long=seconds <= _QUICK and total >= _WARM_UP + _LONG)
            for steps, graph in self._graphs.items():
                while done + steps <= total:
                    graph.replay()
                    done += steps
                    count(steps)
        return done

    def _warm_up(self) -> float:
        """The steps before a capture; how many seconds the host took for each of the last."""
        self._turns(_WARM_UP - _TURNS)
        start = time.perf_counter()
        self._turns(_TURNS)
        return (time.perf_counter() - start) / _TURNS

    def _turns(self, count: int) -> None:
        for step in range(count):
            self._step(step)

    def _capture(self, long: bool) -> None:
        kwargs = self.kwargs
        # The graph reads from here; the caller's tensors remain the caller's.
        with torch.inference_mode(False):
            self.kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        self._captured = self.network.addresses()
        graph = None
        for steps in (_TURNS, _LONG) if long else (_TURNS,):
            graph = graphs.capture(partial(self._turns, steps), beside=graph)
            if graph is None:
                self._graphs = {}
                break
            self._graphs = {steps: graph} | self._graphs
        self._uncapturable = not self._graphs

    def _step(
        self,
        step: int,
        generator: torch.Generator | None = None,
        pred_xstart: Tensor | None = None,
    ) -> None:
        """One step: x, and what the network and the kernel are to be called with next."""
        turn = step % _TURNS
        output = self._predict(turn)
        self._measure(output, turn)
        if generator is None and pred_xstart is None:
            self._advance[turn](output)
            return
        options = self._options[turn] | {"out": self.x}
        if pred_xstart is not None:
            options["pred_xstart"] = pred_xstart
        if generator is not None:
            options |= self._given_noise(step, generator)
        ops.reverse_step(self.x, output, self.rows, self.step_index[turn], **options)

    def _measure(self, output: Tensor, turn: int) -> None:
        """Puts where the kernel reads them the numbers that take a look at a sample as a whole."""
        step, scale, factor = self.step_index[turn], self.guidance_scale, self.guidance_factor
        if factor is not None and scale is not None:
            factor.copy_(rescale_factor(output, scale, step, self.x, self.guidance_rescale))
        if self.threshold is not None and self.table.thresholding is not None:
            measured = self.table.thresholding.threshold(
                self.x, output, self.rows, step, scale, factor
            )
            self.threshold.copy_(measured)

    def _step_options(self, turn: int) -> dict[str, Any]:
        """What reverse_step is called with at every other step."""
        return {
            "seed": self.seed if self.draws_noise else None,
            "sample_index": self.sample_index if self.draws_noise else None,
            "x0_prev": self.history,
            "guidance_scale": self.guidance_scale,
            "guidance_factor": self.guidance_factor,
            "threshold": self.threshold,
            "known": self.known,
            "mask": self.mask,
            "clip": self.table.clip,
            "pred_xstart": self.history,
            "next_input": self.next_input,
            "next_step": self.step_index[turn - 1],
            "next_t": self.t,
            "backend": self.backend,
        }

    def _given_noise(self, step: int, generator: torch.Generator) -> dict[str, Tensor | None]:
        row = dict(zip(ops.ROW, self.table.rows[step].tolist(), strict=True))
        draws = row["sigma"] > 0 or (self.known is not None and row["known_sigma"] > 0)
        noise = self._randn(generator) if draws else None
        return {"noise": noise, "seed": None, "sample_index": None}

    def _predict(self, turn: int) -> Tensor:
        output = self._ready(self.network.call(self.model_input, self.t, **self.kwargs))
        if self.cond_fn is not None:
            gradient = gradient_at(self.cond_fn, self.x, self.t, self.kwargs)
            # An index would be read on the host, and make it wait.
            coef = self.score_coefs.index_select(0, self.step_index[turn].reshape(1))
            output = shifted(output, gradient, coef, self.shape[1])
        return output


def _ready(output: object, x: Tensor, variance_of: int | None) -> Tensor:
    """The network's output for ``x``, with a variance of so many channels where one is read."""
    tensor = ready(output, x)
    if variance_of is not None:
        check_has_variance(tensor, variance_of)
    return tensor


def _progress_bar(total: int, shown: bool) -> AbstractContextManager[Count]:
    """Counts steps; a bar that is not shown need not be made, which takes as long as a step."""
    return _shown_progress_bar(total) if shown else nullcontext(_count_nothing)


@contextmanager
def _shown_progress_bar(total: int) -> Iterator[Count]:
    with tqdm(total=total) as bar:
        yield bar.update


def _count_nothing(steps: int) -> None:
    pass


def checked_shape(shape: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """The shape of a batch; ValueError where it is none."""
    sizes = tuple(operator.index(size) for size in shape)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"shape must be (N, C, ...), each at least 1; got {sizes}")
    return sizes


def checked_first_index(first_index: SupportsIndex, batch: int) -> int:
    """``first_index``, of a batch's first sample; ValueError where one of them has none."""
    first = operator.index(first_index)
    if not 0 <= first <= _MAX_SAMPLES - batch:
        raise ValueError(f"first_index must lie in [0, 2**48 - {batch}]; got {first}")
    return first


def _table(
    diffusion: GaussianDiffusion,
    sampler: str | StepTable,
    num_steps: int | None,
    eta: float,
    timestep_spacing: Spacing,
) -> StepTable:
    if isinstance(sampler, str):
        return step_table(diffusion, sampler, num_steps, eta=eta, timestep_spacing=timestep_spacing)
    if num_steps is not None or eta != 0 or timestep_spacing != "trailing":
        raise ValueError("a step table settles num_steps, eta and timestep_spacing itself")
    return sampler


def _replaceable(captured: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether a graph of the first serves the second, once the tensors have new values."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return isinstance(a, bool | int | float | str | NoneType) and type(a) is type(b) and a == b

    return captured.keys() == kwargs.keys() and all(alike(captured[k], kwargs[k]) for k in kwargs)
