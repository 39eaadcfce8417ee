"""The public ops: each native where the extension has a kernel for the device, else the reference.

``backend`` is ``auto`` (native where it can serve, else the reference, with one warning),
``native`` (RuntimeError where it cannot serve) or ``reference``. Seeds, steps and sample indices
are tensors on the batch's device, so that a captured graph reads them anew at each replay.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from . import _extension, reference
from .checks import (
    Argument,
    check_device,
    check_not_negated,
    check_one_source,
    compute_dtype,
)
from .reference import (
    ROW,
    STREAMS,
    guided,
    learned_stddev,
    normals,
    over_batch,
    per_sample,
    predict_xstart,
    row_of,
    scale_per_sample,
)

__all__ = [
    "BACKENDS",
    "ROW",
    "STREAMS",
    "bound_reverse_step",
    "compute_dtype",
    "philox",
    "philox_normal",
    "q_sample",
    "reverse_step",
    "seed_tensor",
    "serves_natively",
]

BACKENDS = ("auto", "native", "reference")

_warned: set[str] = set()
_native = torch.ops.ddpm_fast


def serves_natively(device: torch.device, backend: str = "auto") -> bool:
    """Whether the compiled kernels serve tensors of a device; else the reference does.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``native`` was asked for, and there is no kernel for the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "reference":
        return False
    if device.type in _extension.native_devices:
        return True
    why = _extension.reason or "no kernels are written for that device"
    if backend == "native":
        raise RuntimeError(f"backend 'native' cannot serve {device.type} tensors: {why}")
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"ddpm_fast computes on {device.type} in plain PyTorch: {why}", stacklevel=3)
    return False


def seed_tensor(seed: SupportsIndex | None, device: torch.device | str) -> Tensor:
    """A seed as the int64 ``[]`` that the ops read: its 64 bits, in device memory.

    None draws one from torch's global generator, which ``torch.manual_seed`` governs.

    Raises:
        ValueError: outside [0, 2**64).
        TypeError: not an integer.
    """
    # Filled, not copied, which the host would wait for.
    return torch.full((), signed_seed(seed), dtype=torch.int64, device=device)


def signed_seed(seed: SupportsIndex | None) -> int:
    """The number in the :func:`seed_tensor` of a seed, likewise drawn or checked."""
    if seed is None:
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    number = operator.index(seed)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2**64); got {number}")
    return number if number < 1 << 63 else number - (1 << 64)


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sample_index: Tensor | None = None,
    x0_prev: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    guidance_factor: Tensor | None = None,
    threshold: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float | None = 1.0,
    out: Tensor | None = None,
    pred_xstart: Tensor | None = None,
    next_input: Tensor | None = None,
    next_step: Tensor | None = None,
    next_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One reverse step, x_{t-1} from x_t, in one pass over memory.

    With the row of the table that ``step`` names (Ho et al. 2020, eqs. 7, 11 and 15)::

        xstart = clamp(x0_from_xt x_t + x0_from_out model_output, -clip, clip)
        x_prev = mean_from_x0 xstart + mean_from_xt x_t + mean_from_out model_output
               + mean_from_x0_prev x0_prev + sigma noise

    A coefficient of zero reads nothing. Where ``model_output`` has twice the channels, its second
    half v turns sigma into sigma exp(logvar / 2), with logvar running from ``min_log_variance``
    at v = -1 to ``max_log_variance`` at v = 1 (Nichol & Dhariwal 2021, eq. 15).

    With a ``guidance_scale`` w, ``uncond + w (cond - uncond)`` takes the place of the output,
    whose first N samples are the conditional ones (Ho & Salimans 2022), times the
    ``guidance_factor``, if there is one (Lin et al. 2023, eqs. 15 and 16). With a ``threshold`` s,
    xstart is clamped to [-s, s] and divided by s (Saharia et al. 2022, section 2.3). With a
    ``mask``, what is ``known`` of x_start stays (Lugmayr et al. 2022, eq. 8)::

        x_prev = mask (known_from_x0 known + known_sigma noise) + (1 - mask) x_prev

    Gradients flow to x_t, model_output, noise, x0_prev and known, and to nothing else.

    Args:
        x_t: ``[N, C, ...]``, contiguous or channels_last.
        model_output: ``[N, C or 2C, ...]``, with guidance ``[2N, C or 2C, ...]``; float64 where x_t
            is, else of any narrower type.
        rows: ``[S, len(ROW)]`` in the compute dtype, from :class:`ddpm_fast.solvers.StepTable`.
        step: int64 ``[]`` or ``[N]``, the row to use, in [0, S - 1].
        noise: like x_t; instead of it,
        seed, sample_index: int64 ``[]`` or ``[N]``, and ``[N]``: draw the noise in the kernel, a
            function of (seed, sample_index, the row's timestep and stream, element). Without
            either there is no noise.
        x0_prev: the previous step's ``pred_xstart``, like x_t.
        guidance_scale: ``[S or 1, N or 1]`` in the compute dtype: w for each row and sample.
        guidance_factor: ``[N]`` in the compute dtype.
        threshold: ``[N]`` in the compute dtype, positive; takes the place of ``clip``.
        known, mask: like x_t, also one sample expanded to all, or one channel; the mask from 0
            (drawn) to 1 (known).
        clip: clamp xstart to [-clip, clip]; None does not.
        out: where to write x_prev, like x_t; x_t itself works in place.
        pred_xstart: where to write xstart, like x_t; may be ``x0_prev`` itself.
        next_input: where to write x_prev for the network to read next: ``[N or 2N, C, ...]`` of
            any type (float64 where x_t is), twice for the two halves that guidance asks for.
        next_step: where to write the step that follows, ``(step + 1) % S``; like ``step``, but
            not ``step`` itself.
        next_t: where to write that step's timestep; int64 ``[N or 2N]``.
        backend: see the module.

    Returns:
        x_prev: ``out``, or a new tensor like x_t.

    Raises:
        ValueError: a shape, device or layout that does not fit, memory that overlaps, noise both
            given and drawn, or a clip that is not positive.
        TypeError: a dtype that does not fit.
        IndexError: a step outside the table. On CUDA, where reading it would make the host wait,
            a device-side assertion, as in PyTorch's own indexing.
        RuntimeError: gradients are asked for through what is written into.
    """
    # What Python does from here on takes as long as the arithmetic of a small batch.
    if (
        (out is not None and out.is_neg())
        or (pred_xstart is not None and pred_xstart.is_neg())
        or (next_input is not None and next_input.is_neg())
    ):
        check_not_negated("reverse_step", out=out, pred_xstart=pred_xstart, next_input=next_input)
    at_hand = backend == "auto" and x_t.device.type in _extension.native_devices
    if not at_hand and not serves_natively(x_t.device, backend):
        return reference.reverse_step(
            x_t,
            model_output,
            rows,
            step,
            noise=noise,
            seed=seed,
            sample_index=sample_index,
            x0_prev=x0_prev,
            guidance_scale=guidance_scale,
            guidance_factor=guidance_factor,
            threshold=threshold,
            known=known,
            mask=mask,
            clip=clip,
            out=out,
            pred_xstart=pred_xstart,
            next_input=next_input,
            next_step=next_step,
            next_t=next_t,
        )
    guidance = guidance_scale, guidance_factor
    kept = known, mask
    sources = noise, seed, sample_index, x0_prev
    inputs = model_output, rows, step, *sources, *guidance, threshold, *kept, clip
    if out is x_t:
        # A compiler knows the ops of torch.ops only.
        traced = torch.compiler.is_compiling()
        in_place = _native.reverse_step_.default if traced else _extension.module.reverse_step_
        in_place(x_t, *inputs, pred_xstart, next_input, next_step, next_t)
        return x_t
    writes = not (out is pred_xstart is next_input is next_step is next_t is None)
    if not writes and _want_gradient(x_t, model_output, noise, x0_prev, known):
        x_prev: Tensor = _native.reverse_step.default(x_t, *inputs)
        return x_prev
    out = torch.empty_like(x_t) if out is None else out
    _native.reverse_step.out(x_t, *inputs, out, pred_xstart, next_input, next_step, next_t)
    return out


def bound_reverse_step(
    x_t: Tensor,
    rows: Tensor,
    step: Tensor,
    *,
    ready: Callable[[Any], Tensor],
    backend: str = "auto",
    **options: Any,
) -> Callable[[Any], object]:
    """:func:`reverse_step` in place, all but the network's output that it is called with settled.

    Between two calls of a small network, what is done here counts. In inference mode, and where
    neither a mode of torch's dispatcher nor a profiler is active, an output like the last one in
    dtype, device, shape and strides goes straight to the kernel.

    Args:
        x_t, rows, step, backend, options: as of :func:`reverse_step`, ``clip`` included. The
            tensors' memory must stay where it is.
        ready: makes a ``model_output`` of what the network returned, for all other outputs and
            those that share memory with what is written.

    Returns:
        The step, to be called with what the network returned. Errors come at the call.
    """
    if not serves_natively(x_t.device, backend):
        return lambda returned: reference.reverse_step(
            x_t, ready(returned), rows, step, **options, out=x_t
        )
    given = [options.pop(name, None) for name in (*_OPTIONS, *_NEXT)]
    assert not options, options
    bound: Callable[[Any], object] = _extension.module.bound_reverse_step(
        ready, x_t, rows, step, *given
    )
    return bound


def q_sample(
    x_start: Tensor,
    t: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sample_index: Tensor | None = None,
    out: Tensor | None = None,
    noise_out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Forward noising: rows[t, 0] x_start + rows[t, 1] noise, and the noise (Ho et al. eq. 4).

    Args:
        x_start: ``[N, C, ...]``, contiguous or channels_last.
        t: int64 ``[]`` or ``[N]``, the row to use, in [0, T - 1].
        rows: ``[T, 2]`` in the compute dtype: sqrt(abar) and sqrt(1 - abar).
        noise: like x_start; instead of it,
        seed, sample_index: int64 ``[]`` or ``[N]``, and ``[N]``: draw the noise in the kernel, a
            function of (seed, sample_index, t, element).
        out: where to write x_t, like x_start; x_start and the given noise themselves will do.
        noise_out: where to write drawn noise, like x_start.
        backend: see the module.

    Returns:
        x_t and the noise: ``out`` and ``noise_out``, or new tensors like x_start.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as :func:`reverse_step`, and ValueError
            where there is neither noise nor a seed.
    """
    if noise is None and seed is None and sample_index is None:
        raise ValueError("q_sample: give noise, or seed and sample_index")
    check_one_source("q_sample", noise, seed, sample_index)
    check_not_negated("q_sample", out=out, noise_out=noise_out)
    if not serves_natively(x_start.device, backend):
        return reference.q_sample(
            x_start,
            t,
            rows,
            noise=noise,
            seed=seed,
            sample_index=sample_index,
            out=out,
            noise_out=noise_out,
        )
    if out is noise_out is None and _want_gradient(x_start, noise):
        if noise is not None:
            return _native.q_sample.default(x_start, t, rows, noise), noise
        x_t, drawn = _native.q_sample.drawn(x_start, t, rows, seed, sample_index)
        return x_t, drawn.detach()
    out = torch.empty_like(x_start) if out is None else out
    if noise is None and noise_out is None:
        noise_out = torch.empty_like(x_start)
    _native.q_sample.out(x_start, t, rows, noise, seed, sample_index, out, noise_out)
    noise = noise_out if noise is None else noise
    assert noise is not None
    return out, noise


def _want_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the op. It is written in Python, at some 10 us a call."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def philox_normal(
    shape: tuple[int, ...],
    *,
    seed: Tensor,
    sample_index: Tensor,
    timestep: Tensor,
    stream: int = STREAMS["initial"],
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Standard normals that are a function of (seed, sample, timestep, stream, element).

    Philox4x32-10 (Salmon et al. 2011) keyed by the seed, through Box & Muller's transform, in
    float32 and then rounded to ``dtype``. The largest possible size is 6.66.

    Args:
        shape: ``(N, ...)``.
        seed: int64 ``[]`` or ``[N]``.
        sample_index: int64 ``[N]``, the samples' indices in the whole run, in [0, 2**48).
        timestep: int64 ``[]`` or ``[N]``, in [0, 2**32).
        stream: what the numbers are for, in [0, 65535]; :data:`STREAMS` names those in use.
        dtype: float32, float64, bfloat16 or float16.
        backend: see the module.

    Raises:
        ValueError: a shape or device that does not fit, or a stream out of range.
        TypeError: a dtype that does not fit.
    """
    if not serves_natively(seed.device, backend):
        return reference.philox_normal(shape, seed, sample_index, timestep, stream, dtype)
    normals: Tensor = _native.philox_normal(shape, seed, sample_index, timestep, stream, dtype)
    return normals


def philox(counter: Tensor, key: Tensor, *, backend: str = "auto") -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each counter.

    Args:
        counter: int64 ``[K, 4]``, words in [0, 2**32).
        key: int64 ``[K, 2]``, likewise.
        backend: see the module.

    Returns:
        int64 ``[K, 4]``, words in [0, 2**32).

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that is not int64.
    """
    if not serves_natively(counter.device, backend):
        return reference.philox(counter, key)
    words: Tensor = _native.philox(counter, key)
    return words


# What torch.compile, the dispatcher and autograd need to know of the native ops.


def _like_first(x: Tensor, *inputs: Any) -> Tensor:
    return torch.empty_like(x)


def _two_like_first(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _nothing(*inputs: Any) -> None:
    return None


def _empty_normals(
    size: list[int],
    seed: Tensor,
    sample_index: Tensor,
    timestep: Tensor,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(size, dtype=dtype, device=seed.device)


def _empty_words(counter: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(counter, memory_format=torch.contiguous_format)


_SOURCES = ("noise", "seed", "sample_index", "x0_prev")
_NUMBERS = ("guidance_scale", "guidance_factor", "threshold")
_OPTIONS = (*_SOURCES, *_NUMBERS, "known", "mask", "clip")
_STEP = ("x_t", "model_output", "rows", "step", *_OPTIONS)
_NOISING = ("x_start", "t", "rows", "noise", "seed", "sample_index")
_NEXT = ("pred_xstart", "next_input", "next_step", "next_t")

# Each native op: the names of its arguments, and the shape of what it returns.
_OPS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "reverse_step": (_STEP, _like_first),
    "reverse_step_": ((*_STEP, *_NEXT), _nothing),
    "reverse_step.out": ((*_STEP, "out", *_NEXT), _nothing),
    "q_sample": (("x_start", "t", "rows", "noise"), _like_first),
    "q_sample.drawn": (("x_start", "t", "rows", "seed", "sample_index"), _two_like_first),
    "q_sample.out": ((*_NOISING, "out", "noise_out"), _nothing),
    "philox_normal": (("shape", "the result", "sample_index", "timestep"), _empty_normals),
    "philox": (("counter", "key"), _empty_words),
}


def _fake(op: str, names: tuple[str, ...], result: Callable[..., Any]) -> Callable[..., Any]:
    """The op without its arithmetic. It is also what the dispatcher calls where devices are mixed
    and one has no kernel; the tensors' own check of it would come too late.
    """

    def fake(*inputs: Any) -> Any:
        given = zip(names, inputs, strict=False)
        tensors = [Argument(op, name, x) for name, x in given if isinstance(x, Tensor)]
        for argument in tensors[1:]:
            check_device(argument, tensors[0])
        return result(*inputs)

    return fake


def _register_fakes() -> None:
    for qualified, (names, result) in _OPS.items():
        fake = _fake(qualified.split(".")[0].rstrip("_"), names, result)
        torch.library.register_fake(f"ddpm_fast::{qualified}", fake)
        if "cuda" not in _extension.native_devices:
            torch.library.impl(f"ddpm_fast::{qualified}", "CUDA", fake)


def _save_reverse_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.clip = inputs
    ctx.save_for_backward(*tensors)


def _reverse_step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = dict(zip(_STEP, ctx.saved_tensors, strict=False))
    x_t, model_output, rows, step = ctx.saved_tensors[:4]
    row = row_of(rows, step, x_t)
    channels = x_t.shape[1]
    grads: dict[str, Tensor] = {}

    g = grad.to(rows.dtype)
    if saved["mask"] is not None:
        keep = saved["mask"].to(rows.dtype)
        grads["known"] = row["known_from_x0"] * keep * g
        grads["noise"] = row["known_sigma"] * keep * g
        g = (1 - keep) * g

    grad_xstart = _through_clamp(ctx, saved, row, row["mean_from_x0"] * g)
    grads["x_t"] = row["x0_from_xt"] * grad_xstart + row["mean_from_xt"] * g
    grads["x0_prev"] = row["mean_from_x0_prev"] * g
    grad_output = row["x0_from_out"] * grad_xstart + row["mean_from_out"] * g
    if saved["guidance_scale"] is not None:
        w = scale_per_sample(saved["guidance_scale"], step, x_t)
        if saved["guidance_factor"] is not None:
            grad_output = over_batch(saved["guidance_factor"], x_t) * grad_output
        grad_output = torch.cat([w * grad_output, (1 - w) * grad_output])

    stddev = row["sigma"]
    if model_output.shape[1] != channels:
        stddev = learned_stddev(row, model_output[: len(x_t), channels:].to(rows.dtype))
        slope = (row["max_log_variance"] - row["min_log_variance"]) / 4
        grad_v = torch.zeros_like(grad_output)  # the unconditional variance is not read
        grad_v[: len(x_t)] = g * _noise_of(saved, row) * stddev * slope
        grad_output = torch.cat([grad_output, grad_v], dim=1)
    grads["model_output"] = grad_output
    grads["noise"] = stddev * g + grads.get("noise", 0.0)

    def of(name: str) -> Tensor | None:
        given = saved.get(name)
        return grads[name].to(given.dtype) if name in grads and given is not None else None

    return tuple(of(name) for name in _STEP)


def _through_clamp(
    ctx: Any, saved: dict[str, Tensor], row: dict[str, Tensor], grad: Tensor
) -> Tensor:
    """The gradient at xstart before its clamp, from the one behind it."""
    threshold, x_t = saved["threshold"], saved["x_t"]
    bound = ctx.clip if threshold is None else over_batch(threshold, x_t)
    if bound is None:
        return grad
    guidance = saved["guidance_scale"], saved["guidance_factor"], saved["step"]
    output = guided(saved["model_output"], *guidance, x_t.shape[1], grad.dtype)
    xstart = predict_xstart(row, x_t.to(grad.dtype), output)
    grad = torch.where(xstart.abs() <= bound, grad, 0.0)
    return grad if threshold is None else grad / bound


def _noise_of(saved: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
    """The noise that the step added, drawn again if need be; zeros where there was none."""
    x_t, dtype = saved["x_t"], row["sigma"].dtype
    if saved["noise"] is not None:
        return saved["noise"].to(dtype)
    if saved["seed"] is None:
        return torch.zeros_like(x_t, dtype=dtype)
    timestep, stream = row["timestep"].long(), row["stream"].long()
    return normals(x_t.shape, saved["seed"], saved["sample_index"], timestep, stream).to(dtype)


def _save_q_sample(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _q_sample_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_start, t, rows = ctx.saved_tensors
    signal, scale = per_sample(rows, t, x_start)
    return (signal * grad).to(grad.dtype), None, None, (scale * grad).to(grad.dtype)


def _drawn_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_q_sample_backward(ctx, grad)[:3], None, None


def _register_autograd() -> None:
    register = torch.library.register_autograd
    register("ddpm_fast::reverse_step", _reverse_step_backward, setup_context=_save_reverse_step)
    register("ddpm_fast::q_sample", _q_sample_backward, setup_context=_save_q_sample)
    register("ddpm_fast::q_sample.drawn", _drawn_backward, setup_context=_save_q_sample)


if _extension.native_devices:
    _register_fakes()
    _register_autograd()
