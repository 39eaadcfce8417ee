"""Each contender is found to compute the right thing before it is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sampler import Sampler
from .contenders import (
    SEED,
    Forward,
    ForwardProblem,
    LoopProblem,
    Step,
    StepProblem,
)

# For each dtype, how far a result may be from the float64 one, in relation to its norm: an eager
# step in bfloat16 rounds after each of its operations, with numbers as large as 10 in between.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# Beyond so many elements only the first and the last sample are compared.
_ALL_SAMPLES = 1 << 20


class WrongResult(ValueError):
    """A contender does not compute what the reference does."""


def check_step(p: StepProblem, step: Step, *, drawn_by: str) -> None:
    """Compare a step with the reference in float64, by the noise that the contender draws.

    Args:
        p: the problem.
        step: a contender's first call.
        drawn_by: "torch" for ``torch.randn`` from the global generator, "counter" for ours,
            "unknown" where all that can be said of the noise is that it is standard normal.

    Raises:
        WrongResult: they differ.
    """
    torch.manual_seed(SEED)
    x_prev = step().double()
    if p.noisy and drawn_by == "unknown":
        check_standard_normal((x_prev - expected_step(p)) / p.row["sigma"], p.x_t)
        return
    samples = _samples_to_compare(p.x_t)
    expected = expected_step(p, samples, **_noise_source(p, samples, drawn_by))
    _check_close(x_prev[samples], expected, p.x_t.dtype)


def _noise_source(p: StepProblem, samples: Tensor, drawn_by: str) -> dict[str, Tensor]:
    """What makes the reference draw the noise that a contender drew for these samples."""
    if p.noisy and drawn_by == "torch":
        torch.manual_seed(SEED)
        return {"noise": torch.randn_like(p.x_t)[samples].double()}
    source = p.noise_source()
    return {name: value[samples] if value.dim() else value for name, value in source.items()}


def expected_step(p: StepProblem, samples: Tensor | None = None, **source: Any) -> Tensor:
    """The reference's step of some samples in float64, without noise if no source is given."""
    if samples is None:
        samples = torch.arange(len(p.x_t), device=p.x_t.device)
    output, scale = p.model_output, None
    if p.guidance_scale is not None:
        output = torch.cat([half[samples] for half in output.chunk(2)])
        scale = torch.full((1, 1), p.guidance_scale, dtype=torch.float64, device=output.device)
    else:
        output = output[samples]
    return ops.reverse_step(
        p.x_t[samples].double(),
        output.double(),
        p.table.to(output.device, torch.float64),
        torch.tensor(p.index, device=output.device),
        guidance_scale=scale,
        backend="reference",
        **source,
    )


def check_standard_normal(noise: Tensor, x_t: Tensor) -> None:
    """Mean 0, variance 1, fourth moment 3, and nothing of the input in it.

    Raises:
        WrongResult: one of them is farther off than chance and rounding allow.
    """
    n = noise.numel()
    moments = {
        "mean": (noise.mean(), 0, 1),
        "variance": (noise.square().mean(), 1, 2),
        "fourth moment": (noise.pow(4).mean(), 3, 96),
        "correlation with x_t": ((noise * x_t).mean(), 0, 1),
    }
    for name, (found, wanted, variance) in moments.items():
        # Five standard errors, and what the rounding of bfloat16 does to numbers of that size.
        allowed = 5 * (variance / n) ** 0.5 + 0.02
        if not abs(float(found) - wanted) <= allowed:
            raise WrongResult(f"noise with {name} {float(found):.4f}, not {wanted}")


def check_forward(p: ForwardProblem, noising: Forward) -> None:
    """x_t must be made of the noise that is returned with it, and that must be normal.

    Raises:
        WrongResult: it is not.
    """
    x_t, noise = noising()
    expected, _ = p.diffusion.q_sample(p.x_start.double(), p.t, noise.double(), backend="reference")
    _check_close(x_t, expected, x_t.dtype)
    check_standard_normal(noise.double(), p.x_start)


def check_our_forward(p: ForwardProblem, noising: Forward) -> None:
    """Compare with the reference that draws the same noise.

    Raises:
        WrongResult: they differ.
    """
    check_forward(p, noising)
    samples = _samples_to_compare(p.x_start)
    expected = p.diffusion.q_sample(
        p.x_start[samples].double(),
        p.t[samples],
        seed=SEED,
        sample_index=samples,
        backend="reference",
    )
    for found, wanted in zip(noising(), expected, strict=True):
        _check_close(found[samples], wanted, found.dtype)


def check_loop(p: LoopProblem, loop: Step, *, drawn_by: str) -> None:
    """Compare a whole chain with the reference's; ``drawn_by`` as for :func:`check_step`.

    Raises:
        WrongResult: they differ.
    """
    run = Sampler(p.network, p.shape, diffusion=p.diffusion, device=p.device, backend="reference")
    torch.manual_seed(SEED)
    found = loop()
    if drawn_by == "torch":
        generator = torch.Generator(p.device).manual_seed(SEED)
        expected = run(generator=generator)
    else:
        expected = run(seed=SEED)
    _check_close(found, expected, p.dtype)


def _samples_to_compare(x: Tensor) -> Tensor:
    few = x.numel() > _ALL_SAMPLES
    return torch.tensor([0, len(x) - 1] if few else range(len(x)), device=x.device)


def _check_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    expected = expected.double()
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE[dtype]:
        raise WrongResult(f"a result differs from the reference by {error:.3g} of its norm")
