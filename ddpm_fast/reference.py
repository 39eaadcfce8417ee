"""What every op computes, in plain PyTorch: the specification, and the fallback.

The native kernels (csrc/step_math.h, csrc/philox.h) are tested against these functions, and these
against float64 and closed forms. They run on any device with float64, and autograd goes through
them.

Tensors: a batch is ``[N, C, ...]``, float32, float64, bfloat16 or float16; arithmetic is float64
for float64 and float32 for all else. Arguments named ``rows`` are tables in the compute dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .checks import Argument

ROW = (
    "x0_from_xt",
    "x0_from_out",
    "mean_from_x0",
    "mean_from_xt",
    "mean_from_out",
    "mean_from_x0_prev",
    "sigma",
    "min_log_variance",
    "max_log_variance",
    "timestep",
    "stream",
    "known_from_x0",
    "known_sigma",
)
"""The columns of a step table, as in csrc/step_math.h."""

STREAMS = {"initial": 0, "reverse": 1, "forward": 2, "resampled": 3}
"""What a run of normals is for: see docs/noise.md."""

NOISE_LAYOUT = 1
"""The version of the random counter's layout: docs/noise.md."""


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
) -> Tensor:
    """One reverse step; see :func:`ddpm_fast.ops.reverse_step`."""
    inputs = {"noise": noise, "x0_prev": x0_prev, "known": known, "mask": mask}
    guides = guidance_scale is not None
    _check_reverse_step(x_t, model_output, rows, step, inputs, seed, sample_index, guided=guides)
    _check_numbers(x_t, rows, guidance_scale, guidance_factor, threshold, clip)
    written = {"out": out, "pred_xstart": pred_xstart, "next_input": next_input}
    _check_memory(x_t, model_output, inputs, written)
    _check_next(x_t, step, seed, sample_index, next_step, next_t)
    row = row_of(rows, step, x_t)
    channels = x_t.shape[1]
    x = x_t.to(rows.dtype)
    output = guided(model_output, guidance_scale, guidance_factor, step, channels, rows.dtype)

    xstart = predict_xstart(row, x, output)
    if clip is not None:
        xstart = xstart.clamp(-clip, clip)
    if threshold is not None:
        bound = over_batch(threshold, x)
        xstart = xstart.clamp(-bound, bound) / bound
    mean = (
        term(row["mean_from_x0"], xstart)
        + term(row["mean_from_xt"], x)
        + term(row["mean_from_out"], output)
    )
    if x0_prev is not None:
        mean = mean + term(row["mean_from_x0_prev"], x0_prev.to(rows.dtype))

    if seed is not None and sample_index is not None:
        timestep, stream = row["timestep"].long(), row["stream"].long()
        noise = normals(x_t.shape, seed, sample_index, timestep, stream)
    if noise is not None:
        stddev = row["sigma"]
        if model_output.shape[1] != channels:
            v = model_output[: len(x_t), channels:].to(rows.dtype)
            stddev = learned_stddev(row, v)
        mean = mean + term(stddev, noise.to(rows.dtype))
    if known is not None and mask is not None:
        mean = keep_known(row, known, mask, noise, mean)

    if pred_xstart is not None:
        pred_xstart.copy_(xstart)
    x_prev = (torch.empty_like(x_t) if out is None else out).copy_(mean)
    if x_prev.numel() > 0:
        if next_input is not None:
            next_input.view(-1, *x_t.shape).copy_(x_prev)
        _advance(rows, step, next_step, next_t, len(x_t))
    return x_prev


def row_of(rows: Tensor, step: Tensor, like: Tensor) -> dict[str, Tensor]:
    """The columns of the row of each sample, to broadcast against a batch."""
    return dict(zip(ROW, per_sample(rows, step, like), strict=True))


def predict_xstart(row: dict[str, Tensor], x_t: Tensor, output: Tensor) -> Tensor:
    """x_start before its clamp: Ho et al. 2020, eq. 15, for a prediction of epsilon."""
    return term(row["x0_from_xt"], x_t) + term(row["x0_from_out"], output)


def term(coefficient: Tensor, value: Tensor) -> Tensor:
    """``coefficient * value``, except that a coefficient of zero reads nothing."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def keep_known(
    row: dict[str, Tensor], known: Tensor, mask: Tensor, noise: Tensor | None, x_prev: Tensor
) -> Tensor:
    """Inpainting, Lugmayr et al. 2022 (arXiv 2201.09865), eq. 8: the mask is 1 where x is known.

    One noise serves both parts, as a pixel belongs to one of them.
    """
    kept = term(row["known_from_x0"], known.to(x_prev.dtype))
    if noise is not None:
        kept = kept + term(row["known_sigma"], noise.to(x_prev.dtype))
    keep = mask.detach().to(x_prev.dtype)
    return term(keep, kept) + term(1 - keep, x_prev)


def over_batch(numbers: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, to broadcast against a batch; no gradient flows to it."""
    return numbers.detach().reshape(-1, *[1] * (like.dim() - 1))


def guided(
    model_output: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    step: Tensor,
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """The prediction without its variance: with a scale, factor (uncond + w (cond - uncond)).

    Ho & Salimans 2022 (arXiv 2207.12598), whose w is 1 less; Lin et al. 2023 (arXiv 2305.08891),
    eqs. 15 and 16, for the factor.
    """
    prediction = model_output[:, :channels].to(dtype)
    if scale is None:
        return prediction
    cond, uncond = prediction.chunk(2)
    mixed = uncond + term(scale_per_sample(scale, step, cond), cond - uncond)
    return mixed if factor is None else mixed * over_batch(factor, mixed)


def scale_per_sample(scale: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """w of each sample at its step, to broadcast against a batch."""
    samples = torch.arange(len(like), device=step.device)
    row = step.expand(len(like)) if len(scale) > 1 else torch.zeros_like(samples)
    column = samples if scale.shape[1] > 1 else torch.zeros_like(samples)
    return over_batch(scale[row, column], like)


def _advance(
    rows: Tensor, step: Tensor, next_step: Tensor | None, next_t: Tensor | None, samples: int
) -> None:
    following = (step + 1) % len(rows)
    if next_step is not None:
        next_step.copy_(following)
    if next_t is not None:
        timestep = rows[:, ROW.index("timestep")].index_select(0, following.reshape(-1))
        next_t.view(-1, samples).copy_(timestep)


def learned_stddev(row: dict[str, Tensor], v: Tensor) -> Tensor:
    """sigma_t of a learned variance, Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15."""
    fraction = (v + 1) * 0.5
    log_variance = fraction * row["max_log_variance"] + (1 - fraction) * row["min_log_variance"]
    return term(row["sigma"], (0.5 * log_variance).exp())


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
) -> tuple[Tensor, Tensor]:
    """Forward noising; see :func:`ddpm_fast.ops.q_sample`."""
    _check_q_sample(x_start, t, rows, noise, seed, sample_index)
    _check_q_sample_outputs(x_start, noise, out, noise_out)
    if seed is not None and sample_index is not None:
        drawn = normals(x_start.shape, seed, sample_index, t, STREAMS["forward"])
        noise = (torch.empty_like(x_start) if noise_out is None else noise_out).copy_(drawn)
    assert noise is not None
    signal, scale = per_sample(rows, t, x_start)
    mixed = signal * x_start.to(rows.dtype) + scale * noise.to(rows.dtype)
    return (torch.empty_like(x_start) if out is None else out).copy_(mixed), noise


def philox_normal(
    shape: tuple[int, ...],
    seed: Tensor,
    sample_index: Tensor,
    timestep: Tensor,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """The normals of the noise contract; see :func:`ddpm_fast.ops.philox_normal`."""
    op = "philox_normal"
    if len(shape) < 1:
        raise ValueError(f"{op}: shape must have at least one dimension; got {list(shape)}")
    like = Argument(op, "the result", torch.empty(shape, dtype=dtype, device=seed.device))
    checks.check_floating(like)
    if not 0 <= stream < 1 << 16:
        raise ValueError(f"{op}: stream must lie in [0, 65535]; got {stream}")
    checks.check_noise_source(like, None, seed, sample_index)
    checks.check_index(Argument(op, "timestep", timestep), like, scalar_allowed=True)
    return normals(shape, seed, sample_index, timestep, stream).to(dtype)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011); see :func:`ddpm_fast.ops.philox`."""
    _check_philox(counter, key)
    return torch.stack(_philox(list(counter.unbind(1)), list(key.unbind(1))), dim=1)


_WORD = 0xFFFFFFFF


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    # int64 products wrap around, and their two halves are right nevertheless.
    x, y, z, w = (word & _WORD for word in counter)
    key0, key1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y = ((product1 >> 32) ^ y ^ key0) & _WORD, product1 & _WORD
        z, w = ((product0 >> 32) ^ w ^ key1) & _WORD, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [x, y, z, w]


def normals(
    shape: tuple[int, ...],
    seed: Tensor,
    sample_index: Tensor,
    timestep: Tensor,
    stream: int | Tensor,
) -> Tensor:
    """float32 of the given shape. The counter's layout, version 1, is told in csrc/philox.h."""
    samples, elements = shape[0], math.prod(shape[1:])
    if samples * elements == 0:
        return torch.empty(shape, device=seed.device)
    call = torch.arange((elements + 3) // 4, device=seed.device)
    index, low, high = (x.reshape(-1, 1) for x in (sample_index, seed, seed >> 32))
    if isinstance(stream, Tensor):
        stream = stream.reshape(-1, 1)
    high_and_stream = stream + ((index >> 32 & 0xFFFF) << 16)
    zero = torch.zeros_like(call + index)
    counter = [call + zero, index + zero, timestep.reshape(-1, 1) + zero, high_and_stream + zero]
    words = _philox(counter, [low & _WORD, high & _WORD])
    pairs = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
    return torch.stack(pairs, dim=-1).reshape(samples, -1)[:, :elements].reshape(shape)


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    # float64, rounded once: what the kernels' float32 arithmetic is measured by.
    u = (word0 >> 1).float() * 2.0**-31 + 2.0**-32
    radius = (-2 * u.double().log()).sqrt()
    angle = (word1 >> 6).double() * (2 * math.pi * 2.0**-26)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def per_sample(rows: Tensor, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of each sample's row, each ``[N or 1, 1, ...]`` to broadcast against a batch."""
    # Unlike rows[index], this reads no index on the host.
    chosen = rows.index_select(0, index.reshape(-1))
    return chosen.reshape(-1, rows.shape[1], *[1] * (like.dim() - 1)).unbind(1)


def _check_reverse_step(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    step: Tensor,
    inputs: dict[str, Tensor | None],
    seed: Tensor | None,
    sample_index: Tensor | None,
    *,
    guided: bool,
) -> None:
    op = "reverse_step"
    x_t, model_output = Argument(op, "x_t", x), Argument(op, "model_output", output)
    table, index = Argument(op, "rows", rows), Argument(op, "step", step)
    checks.check_floating(x_t)
    checks.check_batch(x_t)
    checks.check_layout(x_t)

    checks.check_floating(model_output)
    checks.check_both_double(model_output, x_t)
    checks.check_device(model_output, x_t)
    checks.check_output_shape(model_output, x_t, guided=guided)
    checks.check_layout(model_output)

    checks.check_rows(table, x_t, len(ROW))
    checks.check_index(index, x_t, scalar_allowed=True)
    checks.check_range(index, table)
    checks.check_noise_source(x_t, inputs["noise"], seed, sample_index)
    if (inputs["known"] is None) != (inputs["mask"] is None):
        raise ValueError(f"{op}: known and mask must be given together")
    for name, tensor in inputs.items():
        if tensor is not None:
            checks.check_like(Argument(op, name, tensor), x_t)


def _check_numbers(
    x: Tensor,
    rows: Tensor,
    guidance_scale: Tensor | None,
    guidance_factor: Tensor | None,
    threshold: Tensor | None,
    clip: float | None,
) -> None:
    op = "reverse_step"
    x_t = Argument(op, "x_t", x)
    if guidance_scale is not None:
        scale = Argument(op, "guidance_scale", guidance_scale)
        checks.check_scale(scale, x_t, Argument(op, "rows", rows))
    elif guidance_factor is not None:
        raise ValueError(f"{op}: guidance_factor needs a guidance_scale")
    for name, numbers in {"guidance_factor": guidance_factor, "threshold": threshold}.items():
        if numbers is not None:
            checks.check_per_sample(Argument(op, name, numbers), x_t)
    if clip is not None and threshold is not None:
        raise ValueError(f"{op}: give clip or threshold, not both")
    if clip is not None and not clip > 0:
        raise ValueError(f"{op}: clip must be positive, or None; got {clip:g}")


def _check_memory(
    x: Tensor, output: Tensor, inputs: dict[str, Tensor | None], written: dict[str, Tensor | None]
) -> None:
    if all(tensor is None for tensor in written.values()):
        return
    op = "reverse_step"
    differentiable = [tensor for name, tensor in inputs.items() if name != "mask"]
    checks.check_carry_no_gradient(op, x, output, *differentiable, *written.values())
    x_t = Argument(op, "x_t", x)
    read = {"x_t": x, "model_output": output, **inputs}
    others = [Argument(op, name, tensor) for name, tensor in read.items() if tensor is not None]
    for name, tensor in written.items():
        if tensor is not None:
            argument = Argument(op, name, tensor)
            check = checks.check_next_input if name == "next_input" else checks.check_output
            check(argument, x_t)
            for other in others:
                same = (name, other.name) in _MAY_BE_THE_SAME
                checks.check_no_overlap(argument, other, same_view_allowed=same)
            others.append(argument)


# A step in place, of a network that may return its own input, and a history that moves on.
_MAY_BE_THE_SAME = {("out", "x_t"), ("out", "model_output"), ("pred_xstart", "x0_prev")}


def _check_next(
    x: Tensor,
    step: Tensor,
    seed: Tensor | None,
    sample_index: Tensor | None,
    next_step: Tensor | None,
    next_t: Tensor | None,
) -> None:
    op = "reverse_step"
    read = {"step": step, "seed": seed, "sample_index": sample_index}
    others = [Argument(op, name, tensor) for name, tensor in read.items() if tensor is not None]
    if next_step is not None:
        argument = Argument(op, "next_step", next_step)
        checks.check_next_step(argument, others[0], Argument(op, "x_t", x))
        for other in others:
            checks.check_no_overlap(argument, other, same_view_allowed=False)
        others.append(argument)
    if next_t is not None:
        argument = Argument(op, "next_t", next_t)
        checks.check_next_t(argument, Argument(op, "x_t", x))
        for other in others:
            checks.check_no_overlap(argument, other, same_view_allowed=False)


def _check_q_sample(
    x: Tensor,
    t: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_index: Tensor | None,
) -> None:
    op = "q_sample"
    x_start = Argument(op, "x_start", x)
    checks.check_floating(x_start)
    checks.check_batch(x_start)
    checks.check_layout(x_start)
    checks.check_rows(Argument(op, "rows", rows), x_start, 2)
    checks.check_index(Argument(op, "t", t), x_start, scalar_allowed=True)
    checks.check_range(Argument(op, "t", t), Argument(op, "rows", rows))
    checks.check_noise_source(x_start, noise, seed, sample_index)
    if noise is not None:
        checks.check_like(Argument(op, "noise", noise), x_start)


def _check_q_sample_outputs(
    x: Tensor, noise: Tensor | None, out: Tensor | None, noise_out: Tensor | None
) -> None:
    op = "q_sample"
    if noise is not None and noise_out is not None:
        raise ValueError(f"{op}: give noise, or noise_out to write it into")
    if out is None and noise_out is None:
        return
    checks.check_carry_no_gradient(op, x, noise, out, noise_out)
    x_start = Argument(op, "x_start", x)
    if out is not None:
        checks.check_output(Argument(op, "out", out), x_start)
        checks.check_no_overlap(Argument(op, "out", out), x_start, same_view_allowed=True)
    if out is not None and noise is not None:
        given = Argument(op, "noise", noise)
        checks.check_no_overlap(Argument(op, "out", out), given, same_view_allowed=True)
    if noise_out is not None:
        drawn = Argument(op, "noise_out", noise_out)
        checks.check_output(drawn, x_start)
        checks.check_no_overlap(drawn, x_start, same_view_allowed=False)
        if out is not None:
            checks.check_no_overlap(drawn, Argument(op, "out", out), same_view_allowed=False)


def _check_philox(counter: Tensor, key: Tensor) -> None:
    op = "philox"
    counters, keys = Argument(op, "counter", counter), Argument(op, "key", key)
    checks.check_dtype(counters, torch.int64)
    checks.check_dtype(keys, torch.int64)
    checks.check_device(keys, counters)
    if counter.dim() != 2 or counter.shape[1] != 4:
        raise ValueError(f"{op}: counter must have shape [K, 4]; got {list(counter.shape)}")
    if key.dim() != 2 or list(key.shape) != [counter.shape[0], 2]:
        raise ValueError(
            f"{op}: key must have shape [{counter.shape[0]}, 2]; got {list(key.shape)}"
        )
